// How the ranks of an expert-parallel engine exchange tensors on CPUs: the ops `moe_export::AllReduce` and
// `moe_export::AllToAll` call MPI through a table that the program fills in.
//
// The library links no MPI: each MPI has its own binary interface, and only the program knows which one it
// has started. So the program hands over the addresses of five MPI functions and the handles they take.
// moe_export/backends/onnxruntime/exchange.py does it from Python with mpi4py; a program in C does it like
// this (communicator: MPI_COMM_WORLD duplicated, with the error handler MPI_ERRORS_RETURN):
//
//   MPI_Datatype unit;
//   MPI_Type_contiguous(MOE_EXPORT_EXCHANGE_UNIT, MPI_BYTE, &unit);
//   MPI_Type_commit(&unit);
//   MoeExportExchange table = {MOE_EXPORT_EXCHANGE_VERSION, rank, ranks, 60.0, (uintptr_t)communicator,
//                              (uintptr_t)unit, (uintptr_t)MPI_FLOAT, (uintptr_t)MPI_INT64_T, ...};
//   const char* problem = MoeExportSetExchange(&table);
//
// A handle is an int in MPICH and its relatives, and a pointer in Open MPI and in the standard's own binary
// interface. It is passed as uintptr_t: in the calling conventions of x86-64 (System V) and AArch64 an int
// argument is the low half of the register or stack slot that a pointer takes, and the upper half is ignored.

#ifndef MOE_EXPORT_PLUGINS_CPU_INCLUDE_MOE_EXPORT_EXCHANGE_H_
#define MOE_EXPORT_PLUGINS_CPU_INCLUDE_MOE_EXPORT_EXCHANGE_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Of the structs below.
#define MOE_EXPORT_EXCHANGE_VERSION 1
// Bytes of the datatype `unit`.
#define MOE_EXPORT_EXCHANGE_UNIT 64
// Most bytes of an MPI_Status and of an MPI_Request.
#define MOE_EXPORT_EXCHANGE_STATUS 256
#define MOE_EXPORT_EXCHANGE_REQUEST 16
// Most ranks of an exchange.
#define MOE_EXPORT_EXCHANGE_RANKS 1024

typedef struct MoeExportExchange {
  uint32_t version;  // MOE_EXPORT_EXCHANGE_VERSION
  int32_t rank;      // of this process, 0 to ranks - 1
  int32_t ranks;     // in the communicator, 1 to MOE_EXPORT_EXCHANGE_RANKS
  double timeout;    // seconds, more than 0: how long one exchange may wait for the other ranks

  uintptr_t communicator;  // MPI_Comm that nothing else uses, with MPI_ERRORS_RETURN
  uintptr_t unit;          // MPI_Datatype of MOE_EXPORT_EXCHANGE_UNIT contiguous bytes, committed
  uintptr_t float32;       // MPI_FLOAT
  uintptr_t int64;         // MPI_INT64_T
  uintptr_t sum;           // MPI_SUM
  uintptr_t max;           // MPI_MAX

  // MPI_Iallreduce, MPI_Ialltoall, MPI_Test and MPI_Error_string.
  int (*iallreduce)(const void* send, void* receive, int count, uintptr_t datatype, uintptr_t op,
                    uintptr_t communicator, void* request);
  int (*ialltoall)(const void* send, int send_count, uintptr_t send_type, void* receive, int receive_count,
                   uintptr_t receive_type, uintptr_t communicator, void* request);
  int (*test)(void* request, int* done, void* status);
  int (*error_string)(int code, char* text, int* length);
  int32_t error_string_bytes;  // MPI_MAX_ERROR_STRING
} MoeExportExchange;

// What one op has done since the table was set.
typedef struct MoeExportOpUse {
  uint64_t calls;  // that ended well
  // AllReduce: bytes of this rank's tensors. AllToAll: bytes of the blocks for other ranks. Neither counts
  // what MPI and the checks add.
  uint64_t bytes;
  double seconds;  // from the start of an exchange to its end, waiting for other ranks included
} MoeExportOpUse;

typedef struct MoeExportExchangeUse {
  MoeExportOpUse all_reduce;
  MoeExportOpUse all_to_all;
  int32_t failed;  // 1: an exchange failed, so all further ones do; 0: none has
} MoeExportExchangeUse;

// Takes a copy of the table, for all sessions of this process. Null: the ops fail from now on. Returns null,
// or what is wrong with the table (a text that is never freed); then all is as before. Not while a session
// runs. MPI must allow calls from the thread that runs the session (MPI_THREAD_SERIALIZED: and no call of
// another thread meanwhile).
const char* MoeExportSetExchange(const MoeExportExchange* table);

// Fills `use`; zeros while no table is set.
void MoeExportGetExchangeUse(MoeExportExchangeUse* use);

#ifdef __cplusplus
}
#endif

#endif  // MOE_EXPORT_PLUGINS_CPU_INCLUDE_MOE_EXPORT_EXCHANGE_H_
