# Options of the build. Each optional part is AUTO (use it if it is found), ON (stop without it) or OFF.
option(PERSEID_BUILD_EXAMPLES "Build the example programs" ${PROJECT_IS_TOP_LEVEL})
option(PERSEID_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(PERSEID_UNITY_BUILD "Compile files with LibTorch's headers in groups: half the time of a whole build"
  ON)
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

# CUDA: toolkit 13 and its compiler. The language is enabled once the build type is known, see below.
if(PERSEID_CUDA STREQUAL "OFF")
  message(STATUS "CUDA: off (PERSEID_CUDA=OFF)")
else()
  include(CheckLanguage)
  check_language(CUDA)
  find_package(CUDAToolkit 13 QUIET)
  if(CMAKE_CUDA_COMPILER AND CUDAToolkit_FOUND)
    set(PERSEID_HAS_CUDA TRUE)
    message(STATUS "CUDA: toolkit ${CUDAToolkit_VERSION}, ${CMAKE_CUDA_COMPILER}")
  elseif(PERSEID_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PERSEID_CUDA=ON, but no CUDA toolkit 13 with nvcc was found; put its bin folder "
      "on PATH or set -DCMAKE_CUDA_COMPILER=<nvcc>, or set -DPERSEID_CUDA=OFF")
  else()
    message(STATUS "CUDA: off (no CUDA toolkit 13 with nvcc found)")
  endif()
endif()

# NCCL: the library of GPU ranks; needs CUDA.
if(PERSEID_NCCL STREQUAL "OFF")
  message(STATUS "NCCL: off (PERSEID_NCCL=OFF)")
else()
  find_path(PERSEID_NCCL_INCLUDE nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
  find_library(PERSEID_NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS ${CUDAToolkit_LIBRARY_DIR})
  mark_as_advanced(PERSEID_NCCL_INCLUDE PERSEID_NCCL_LIBRARY)
  if(PERSEID_HAS_CUDA AND PERSEID_NCCL_INCLUDE AND PERSEID_NCCL_LIBRARY)
    set(PERSEID_HAS_NCCL TRUE)
    message(STATUS "NCCL: ${PERSEID_NCCL_LIBRARY}")
  elseif(PERSEID_NCCL STREQUAL "ON" AND NOT PERSEID_HAS_CUDA)
    message(FATAL_ERROR "PERSEID_NCCL=ON needs CUDA, which is off; set -DPERSEID_CUDA=ON as well")
  elseif(PERSEID_NCCL STREQUAL "ON")
    message(FATAL_ERROR "PERSEID_NCCL=ON, but nccl.h and libnccl.so.2 were not found; install NCCL 2.28.9 "
      "or newer, set -DPERSEID_NCCL_INCLUDE and -DPERSEID_NCCL_LIBRARY, or set -DPERSEID_NCCL=OFF")
  else()
    message(STATUS "NCCL: off (not found, or CUDA is off)")
  endif()
endif()

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
# Real code for sm_90 (H100, H200) and PTX of it, which newer GPUs translate.
if(PERSEID_HAS_CUDA)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90)
  endif()
  # LibTorch brings the shared one.
  set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
  # CMake 3.25 does not know nvcc's flag for C++20, and with CMAKE_CXX_STANDARD set it stops here.
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  endif()
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_EXTENSIONS OFF)
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
# nvcc says what each kernel takes; .ci/check_ptxas reads it.
if(PERSEID_HAS_CUDA AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${CMAKE_CURRENT_LIST_DIR}/nvcc_report.sh")
  if(PERSEID_CCACHE)
    list(APPEND CMAKE_CUDA_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env
      "CCACHE_BASEDIR=${PROJECT_SOURCE_DIR}" "${PERSEID_CCACHE}")
  endif()
endif()
