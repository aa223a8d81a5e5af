# Options of the build. Each optional part is AUTO (use it if it is found), ON (stop without it) or OFF.
option(PERSEID_BUILD_EXAMPLES "Build the example programs" ${PROJECT_IS_TOP_LEVEL})
option(PERSEID_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(PERSEID_PYTHON_OPS "Build libperseid_ops.so, which torch.ops.load_library loads in Python"
  ${PROJECT_IS_TOP_LEVEL})
option(PERSEID_INSTALL "Add the rules of cmake --install" ${PROJECT_IS_TOP_LEVEL})
set(PERSEID_PYTHON "" CACHE FILEPATH
  "Python with torch for the tests of PERSEID_PYTHON_OPS; empty: that of .venv, else python3")
set(PERSEID_SANITIZE "" CACHE STRING "Sanitizers for our code: empty, address;undefined or thread")

foreach(part IN ITEMS CUDA NCCL MPI)
  set(PERSEID_${part} AUTO CACHE STRING "Build the ${part} part: AUTO, ON or OFF")
  set_property(CACHE PERSEID_${part} PROPERTY STRINGS AUTO ON OFF)
  if(NOT PERSEID_${part} MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "PERSEID_${part}=${PERSEID_${part}} is none of AUTO, ON, OFF; "
      "set -DPERSEID_${part}=AUTO to use it where it is found")
  endif()
  set(PERSEID_HAS_${part} FALSE)
endforeach()

# The GPU parts are not written yet.
foreach(part IN ITEMS CUDA NCCL)
  if(PERSEID_${part} STREQUAL "ON")
    message(FATAL_ERROR "PERSEID_${part}=ON, but Perseid ${PROJECT_VERSION} runs on CPUs only: it has no "
      "${part} part yet; set -DPERSEID_${part}=AUTO or OFF")
  endif()
  message(STATUS "${part}: off (not part of Perseid ${PROJECT_VERSION} yet)")
endforeach()

# MPI: only its C binding; the C++ one is deprecated and gone from Open MPI 5.
if(PERSEID_MPI STREQUAL "OFF")
  message(STATUS "MPI: off (PERSEID_MPI=OFF)")
else()
  find_package(MPI COMPONENTS C)
  set(PERSEID_HAS_MPI ${MPI_C_FOUND})
  if(NOT PERSEID_HAS_MPI AND PERSEID_MPI STREQUAL "ON")
    message(FATAL_ERROR "PERSEID_MPI=ON, but no MPI was found; install the Debian packages "
      "libopenmpi-dev and openmpi-bin, or set -DPERSEID_MPI=OFF")
  elseif(NOT PERSEID_HAS_MPI)
    message(STATUS "MPI: off (none found; Debian packages libopenmpi-dev and openmpi-bin)")
  endif()
endif()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release or RelWithDebInfo" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11)
  message(FATAL_ERROR "Perseid is C++20 and needs g++ 11 or newer; ${CMAKE_CXX_COMPILER} is "
    "${CMAKE_CXX_COMPILER_VERSION}; set -DCMAKE_CXX_COMPILER=<a newer one>")
endif()

# ccache with the settings that precompiled headers need. Depend mode saves a run of the preprocessor
# for each file, and the base folder lets several build folders and clones share results.
find_program(PERSEID_CCACHE ccache)
if(PERSEID_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env
    CCACHE_SLOPPINESS=pch_defines,time_macros CCACHE_DEPEND=1 "CCACHE_BASEDIR=${PROJECT_SOURCE_DIR}"
    "${PERSEID_CCACHE}")
endif()
