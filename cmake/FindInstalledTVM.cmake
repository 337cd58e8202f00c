# Imported targets for the TVM that ${Python_EXECUTABLE} imports: tvm::runtime and tvm::ffi, and
# TVM_VERSION, TVM_FFI_VERSION, KV_STATE_SHA256. (The wheel's own find_package(tvm) files are incomplete.)
# Asked anew at every configure, and not cached: the TVM beside a build folder may be replaced.

execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_tvm.py"
  OUTPUT_VARIABLE _tvm_facts
  ERROR_VARIABLE _tvm_error
  RESULT_VARIABLE _tvm_result
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT _tvm_result EQUAL 0)
  message(FATAL_ERROR "tvm-flashinfer: ${_tvm_error}")
endif()
string(REGEX MATCHALL "[^\n]+" _tvm_facts "${_tvm_facts}")
foreach(_fact IN LISTS _tvm_facts)
  if(_fact MATCHES "^(TVM_[A-Z_]+)=(.*)$")
    set(${CMAKE_MATCH_1} "${CMAKE_MATCH_2}")
  endif()
endforeach()

file(SHA256 "${TVM_KV_STATE}" KV_STATE_SHA256)
# Another TVM in the same place means another configure before the next build.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${TVM_KV_STATE}"
                                       "${TVM_RUNTIME_LIBRARY}" "${TVM_FFI_LIBRARY}")

add_library(tvm::ffi SHARED IMPORTED)
set_target_properties(tvm::ffi PROPERTIES IMPORTED_LOCATION "${TVM_FFI_LIBRARY}")
target_include_directories(tvm::ffi SYSTEM INTERFACE "${TVM_FFI_INCLUDE_DIR}"
                                              "${TVM_FFI_DLPACK_INCLUDE_DIR}")

# kv_state.h is a source file of TVM's, not an installed header: a copy under its own name on the
# include path (<vm/kv_state.h>) keeps the rest of TVM's source folder off that path.
configure_file("${TVM_KV_STATE}" "${CMAKE_CURRENT_BINARY_DIR}/tvm_private/vm/kv_state.h"
               COPYONLY)
add_library(tvm::runtime SHARED IMPORTED)
set_target_properties(tvm::runtime PROPERTIES IMPORTED_LOCATION "${TVM_RUNTIME_LIBRARY}")
target_include_directories(
  tvm::runtime SYSTEM INTERFACE "${TVM_INCLUDE_DIR}" "${CMAKE_CURRENT_BINARY_DIR}/tvm_private"
                         "${CMAKE_CURRENT_SOURCE_DIR}/cuda_src/compat")
target_link_libraries(tvm::runtime INTERFACE tvm::ffi)
message(STATUS "TVM ${TVM_VERSION} (tvm-ffi ${TVM_FFI_VERSION}): ${TVM_RUNTIME_LIBRARY}")
