// A libcuda.so.1 that records what it is told, so that the path through cuda-bindings to the driver can be tested
// on a machine without one. It computes nothing. Environment: RECORD_FILE, where to; PARAMETER_BYTES, sizes of the
// kernel's parameters, as "8,4,8"; NO_DEVICE and INIT_FAILS, what is wrong with the machine.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void record(const char* format, ...) {
  FILE* file = fopen(getenv("RECORD_FILE"), "a");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(file, format, arguments);
  va_end(arguments);
  fclose(file);
}

int cuInit(unsigned flags) { return getenv("INIT_FAILS") ? 100 : (int)flags; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* count) { return *count = getenv("NO_DEVICE") ? 0 : 1, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuCtxGetDevice(int* device) { return record("device\n"), *device = 0, 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)0xC0, 0; }
int cuCtxSetCurrent(void* context) { return context == (void*)0xC0 ? 0 : 201; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)0xC0, device; }
int cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "recorder"), device; }

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 9 : attribute == 97 ? 101376 : -1;
  return device;
}

int cuLibraryLoadData(void** library, const void* code, void* options, void* values, unsigned count, void* more,
                      void* more_values, unsigned more_count) {
  (void)options, (void)values, (void)more, (void)more_values;
  record("load %.4s %zu %u %u\n", (const char*)code + 1, strlen((const char*)code + 4), count, more_count);
  return *library = (void*)0x11, 0;
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  record("kernel %p %s\n", library, name);
  return *kernel = (void*)0x22, strcmp(name, "missing") ? 0 : 500;
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  record("attribute %d %d %p %d\n", attribute, value, kernel, device);
  return 0;
}

int cuKernelGetFunction(void** function, void* kernel) { return *function = (char*)kernel + 0x11, 0; }

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  record("launch %p %u,%u,%u %u,%u,%u %u %p %p", function, gx, gy, gz, bx, by, bz, shared, stream, (void*)extra);
  int index = 0;
  for (const char* at = getenv("PARAMETER_BYTES"); at && *at; ++index) {
    int bytes = atoi(at);
    if (bytes == 8) record(" %llu", *(unsigned long long*)parameters[index]);
    if (bytes == 4) record(" %d", *(int32_t*)parameters[index]);
    at = strchr(at, ',');
    at = at ? at + 1 : 0;
  }
  record("\n");
  return 0;
}

#define ENTRY(name) {#name, (void*)name}
static const struct { const char* name; void* function; } kEntries[] = {
    ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuCtxGetDevice),
    ENTRY(cuCtxGetCurrent), ENTRY(cuCtxSetCurrent), ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuDeviceGetName),
    ENTRY(cuDeviceGetAttribute), ENTRY(cuLibraryLoadData), ENTRY(cuLibraryGetKernel), ENTRY(cuKernelSetAttribute),
    ENTRY(cuKernelGetFunction), ENTRY(cuLaunchKernel)};

int cuGetProcAddress_v2(const char* name, void** found, int version, uint64_t flags, int* status) {
  (void)version, (void)flags;
  *found = 0;
  for (size_t i = 0; i < sizeof kEntries / sizeof *kEntries; ++i) {
    if (!strcmp(name, kEntries[i].name)) *found = kEntries[i].function;
  }
  if (status) *status = *found ? 0 : 1;
  return 0;
}
int cuGetProcAddress(const char* name, void** found, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, found, version, flags, 0);
}
