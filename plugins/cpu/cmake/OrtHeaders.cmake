# find_ort_headers(<variable>): the folder of onnxruntime_c_api.h. Looked for in this order:
#   1. ORT_INCLUDE_DIR (CMake or environment); nothing else is tried when it is given
#   2. the system (package libonnxruntime-dev)
#   3. a registry package that carries the headers, fetched with pip into the build folder
# The C API only ever grows, so headers of any version from 17 on make a library for every ONNX Runtime from 1.17 on.

set(MOE_EXPORT_OLDEST_ORT_API 17)

function(_ort_api_version folder result)
  set(${result} 0 PARENT_SCOPE)
  if(EXISTS "${folder}/onnxruntime_c_api.h")
    file(STRINGS "${folder}/onnxruntime_c_api.h" lines REGEX "^#define ORT_API_VERSION [0-9]+")
    if(lines MATCHES "ORT_API_VERSION ([0-9]+)")
      set(${result} ${CMAKE_MATCH_1} PARENT_SCOPE)
    endif()
  endif()
endfunction()

function(find_ort_headers result)
  set(given "${ORT_INCLUDE_DIR}")
  if(given STREQUAL "")
    set(given "$ENV{ORT_INCLUDE_DIR}")
  endif()
  if(NOT given STREQUAL "")
    foreach(folder IN ITEMS "${given}" "${given}/onnxruntime" "${given}/onnxruntime/core/session")
      _ort_api_version("${folder}" version)
      if(version GREATER_EQUAL MOE_EXPORT_OLDEST_ORT_API)
        message(STATUS "ONNX Runtime headers: ${folder} (API ${version})")
        set(${result} "${folder}" PARENT_SCOPE)
        return()
      endif()
    endforeach()
    message(FATAL_ERROR "ORT_INCLUDE_DIR is '${given}', and no onnxruntime_c_api.h of API "
      "${MOE_EXPORT_OLDEST_ORT_API} or newer is there. Give the folder that holds this file.")
  endif()

  find_path(MOE_EXPORT_SYSTEM_ORT onnxruntime_c_api.h
    PATH_SUFFIXES onnxruntime onnxruntime/core/session NO_CACHE)
  if(MOE_EXPORT_SYSTEM_ORT)
    _ort_api_version("${MOE_EXPORT_SYSTEM_ORT}" version)
    if(version GREATER_EQUAL MOE_EXPORT_OLDEST_ORT_API)
      message(STATUS "ONNX Runtime headers: ${MOE_EXPORT_SYSTEM_ORT} (API ${version})")
      set(${result} "${MOE_EXPORT_SYSTEM_ORT}" PARENT_SCOPE)
      return()
    endif()
    message(STATUS "ONNX Runtime headers of the system are too old (API ${version}): ${MOE_EXPORT_SYSTEM_ORT}")
  endif()

  set(fetched "${CMAKE_BINARY_DIR}/onnxruntime-headers")
  _ort_api_version("${fetched}" version)
  if(version LESS MOE_EXPORT_OLDEST_ORT_API)
    find_package(Python3 COMPONENTS Interpreter)
    set(output "no Python interpreter found")
    set(code 1)
    if(Python3_Interpreter_FOUND)
      execute_process(
        COMMAND "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/fetch_ort_headers.py" "${fetched}"
        RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output)
    endif()
    _ort_api_version("${fetched}" version)
    if(NOT code EQUAL 0 OR version LESS MOE_EXPORT_OLDEST_ORT_API)
      message(FATAL_ERROR "No ONNX Runtime C headers for the CPU plugin. Do one of these:\n"
        "  - give their folder:     ORT_INCLUDE_DIR=/path/to/include pip install .\n"
        "    (the release archives of ONNX Runtime hold them in include/)\n"
        "  - install the package:   apt install libonnxruntime-dev (Debian 13 or newer)\n"
        "  - let pip fetch them:    needs access to a package index; that failed with:\n${output}\n"
        "  - install without it:    MOE_EXPORT_CPU_PLUGIN=off pip install . (engines then run the ops' ONNX "
        "bodies)")
    endif()
  endif()
  message(STATUS "ONNX Runtime headers: ${fetched} (API ${version}, from a registry package)")
  set(${result} "${fetched}" PARENT_SCOPE)
endfunction()
