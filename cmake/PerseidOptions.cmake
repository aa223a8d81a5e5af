# Options of the build; each optional part is AUTO (use it if found), ON (fail without it) or OFF.
option(PERSEID_BUILD_EXAMPLES "Build the example programs" ${PROJECT_IS_TOP_LEVEL})
option(PERSEID_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
set(PERSEID_SANITIZE "" CACHE STRING "Sanitizers for our code: empty, address;undefined or thread")

foreach(part IN ITEMS CUDA NCCL MPI)
  set(PERSEID_${part} AUTO CACHE STRING "Build the ${part} part: AUTO, ON or OFF")
  set_property(CACHE PERSEID_${part} PROPERTY STRINGS AUTO ON OFF)
endforeach()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release or RelWithDebInfo" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

find_program(PERSEID_CCACHE ccache)
if(PERSEID_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${PERSEID_CCACHE}")
endif()

# MPI: only its C binding; the C++ one is deprecated and gone from Open MPI 5.
set(PERSEID_HAS_MPI FALSE)
if(NOT PERSEID_MPI STREQUAL "OFF")
  find_package(MPI COMPONENTS C)
  if(MPI_C_FOUND)
    set(PERSEID_HAS_MPI TRUE)
  elseif(PERSEID_MPI STREQUAL "ON")
    message(FATAL_ERROR "PERSEID_MPI=ON, but no MPI was found; install libopenmpi-dev or set -DPERSEID_MPI=OFF")
  endif()
endif()
