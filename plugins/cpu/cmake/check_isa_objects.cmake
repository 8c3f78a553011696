# cmake -DNM=<nm> -DOBJECTS=<a;b;...> -P check_isa_objects.cmake
#
# Fails when an object file compiled for AVX2 or AVX-512 defines a weak symbol: an inline or template function, of which
# the linker keeps any one copy. Kept from such a file, it would be an illegal instruction on older processors.
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "_(avx2|avx512)\\.cc\\.o")
    continue()
  endif()
  execute_process(COMMAND "${NM}" --defined-only "${object}" OUTPUT_VARIABLE symbols RESULT_VARIABLE code)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${NM} ${object} failed")
  endif()
  string(REGEX MATCHALL "[0-9a-f]+ [WVuwv] [^\n]+" shared "${symbols}")
  # Data of debuggers and exception handling is the same everywhere.
  list(FILTER shared EXCLUDE REGEX "DW\\.ref")
  if(shared)
    list(JOIN shared "\n  " text)
    message(FATAL_ERROR "${object} defines functions that other files may share:\n  ${text}\n"
      "Put them into an unnamed namespace, or use no such templates in this file.")
  endif()
endforeach()
