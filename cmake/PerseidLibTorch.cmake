# Finds LibTorch and defines Perseid::libtorch. Sets perseid_torch_error to a sentence if it cannot.
# LibTorch's own CMake files are not used: those of a CUDA wheel stop on a machine without a CUDA
# toolkit. If the project has called find_package(Torch) already, its targets are taken.
# Installed beside PerseidConfig.cmake, which includes it.
set(PERSEID_TORCH_VERSION 2.11)
set(PERSEID_TORCH_DIR "" CACHE PATH "Folder of LibTorch, with include/ and lib/ below it")
set(perseid_torch_error "")
if(TARGET Perseid::libtorch)
  return()
endif()

set(perseid_torch_places "")
if(TARGET torch_cpu)
  get_target_property(location torch_cpu LOCATION)
  get_filename_component(location "${location}/../.." ABSOLUTE)
  list(APPEND perseid_torch_places "${location}")
elseif(PERSEID_TORCH_DIR)
  list(APPEND perseid_torch_places "${PERSEID_TORCH_DIR}")
else()
  # torch.utils.cmake_prefix_path is TORCH/share/cmake, Torch_DIR is TORCH/share/cmake/Torch.
  foreach(prefix IN LISTS CMAKE_PREFIX_PATH)
    list(APPEND perseid_torch_places "${prefix}" "${prefix}/../..")
  endforeach()
  if(Torch_DIR)
    list(APPEND perseid_torch_places "${Torch_DIR}/../../..")
  endif()
  file(GLOB wheels "${CMAKE_CURRENT_LIST_DIR}/../.venv/lib/python3*/site-packages/torch")
  list(APPEND perseid_torch_places ${wheels})
endif()

unset(perseid_torch)
foreach(place IN LISTS perseid_torch_places)
  if(EXISTS "${place}/include/ATen/ATen.h")
    get_filename_component(perseid_torch "${place}" REALPATH)
    break()
  endif()
endforeach()
if(NOT perseid_torch)
  list(JOIN perseid_torch_places ", " places)
  if(places STREQUAL "")
    set(places "CMAKE_PREFIX_PATH and PERSEID_TORCH_DIR, which are empty")
  endif()
  string(CONCAT perseid_torch_error "Perseid needs LibTorch ${PERSEID_TORCH_VERSION} and found none in "
    "${places}; set -DPERSEID_TORCH_DIR=<folder with include/ and lib/>, which "
    "python3 -c 'import torch; print(torch.__path__[0])' prints")
  return()
endif()

# Versions before 2.9 keep their numbers in another header; read whichever is there.
set(perseid_torch_found "of an unknown version")
foreach(header IN ITEMS include/torch/headeronly/version.h include/torch/csrc/api/include/torch/version.h)
  if(EXISTS "${perseid_torch}/${header}")
    file(STRINGS "${perseid_torch}/${header}" lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
    list(JOIN lines " " text)
    if(text MATCHES "MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+)")
      set(perseid_torch_found "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}.${CMAKE_MATCH_3}")
      break()
    endif()
  endif()
endforeach()
string(REPLACE "." "\\." version "${PERSEID_TORCH_VERSION}")
if(NOT perseid_torch_found MATCHES "^${version}\\.")
  string(CONCAT perseid_torch_error "Perseid needs LibTorch ${PERSEID_TORCH_VERSION}, but "
    "${perseid_torch} is LibTorch ${perseid_torch_found}; "
    "set -DPERSEID_TORCH_DIR=<folder of LibTorch ${PERSEID_TORCH_VERSION}>")
  return()
endif()
message(STATUS "LibTorch ${perseid_torch_found}: ${perseid_torch}")

# The GPU part of LibTorch, if this build or package has one. It must load where it is linked.
if(PERSEID_HAS_CUDA)
  execute_process(COMMAND ldd "${perseid_torch}/lib/libtorch_cuda.so" OUTPUT_VARIABLE perseid_ldd
    ERROR_VARIABLE perseid_ldd_error RESULT_VARIABLE perseid_ldd_status)
  string(REGEX MATCHALL "[^ \t\n]+ => not found" perseid_lacks "${perseid_ldd}")
  if(perseid_lacks OR NOT perseid_ldd_status EQUAL 0)
    string(REPLACE " => not found" "" perseid_lacks "${perseid_lacks}")
    list(JOIN perseid_lacks ", " perseid_lacks)
    if(NOT PERSEID_CUDA STREQUAL "AUTO")
      string(CONCAT perseid_torch_error "libtorch_cuda.so of ${perseid_torch} cannot be loaded "
        "(missing: ${perseid_lacks}${perseid_ldd_error}); install the CUDA 13 toolkit with cuDNN and NCCL and "
        "the wheels that cmake/setup.sh names, or set -DPERSEID_CUDA=OFF")
      return()
    endif()
    message(STATUS "CUDA: off (libtorch_cuda.so misses ${perseid_lacks})")
    set(PERSEID_HAS_CUDA FALSE)
    set(PERSEID_HAS_NCCL FALSE)
  else()
    # The CUDA runtime and NCCL are those that LibTorch loads: a second one in a process does harm.
    foreach(library IN ITEMS cudart nccl)
      if(perseid_ldd MATCHES "lib${library}\\.so[.0-9]* => ([^ \t\n]+)")
        add_library(Perseid::${library} SHARED IMPORTED GLOBAL)
        set_target_properties(Perseid::${library} PROPERTIES IMPORTED_LOCATION "${CMAKE_MATCH_1}")
      endif()
    endforeach()
  endif()
endif()

# OpenMP is the thread pool that our code shares with LibTorch.
add_library(Perseid::libtorch INTERFACE IMPORTED GLOBAL)
set_target_properties(Perseid::libtorch PROPERTIES
  INTERFACE_INCLUDE_DIRECTORIES
    "${perseid_torch}/include;${perseid_torch}/include/torch/csrc/api/include"
  INTERFACE_LINK_OPTIONS -fopenmp)
if(TARGET torch_cpu)
  target_link_libraries(Perseid::libtorch INTERFACE torch_cpu c10)
else()
  foreach(library IN ITEMS torch_cpu c10)
    add_library(Perseid::${library} SHARED IMPORTED GLOBAL)
    set_target_properties(Perseid::${library} PROPERTIES
      IMPORTED_LOCATION "${perseid_torch}/lib/lib${library}.so")
    target_link_libraries(Perseid::libtorch INTERFACE Perseid::${library})
  endforeach()
  if(PERSEID_HAS_CUDA)
    add_library(Perseid::c10_cuda SHARED IMPORTED GLOBAL)
    set_target_properties(Perseid::c10_cuda PROPERTIES
      IMPORTED_LOCATION "${perseid_torch}/lib/libc10_cuda.so")
    # Nobody calls libtorch_cuda.so by name: it registers its operations when it is loaded.
    target_link_libraries(Perseid::libtorch INTERFACE
      "-Wl,--push-state,--no-as-needed,${perseid_torch}/lib/libtorch_cuda.so,--pop-state"
      Perseid::c10_cuda Perseid::cudart)
  endif()
  # The libraries behind torch_cpu (CUDA runtime, CUPTI) are found by its own run path.
  target_link_options(Perseid::libtorch INTERFACE
    LINKER:--unresolved-symbols=ignore-in-shared-libs)
endif()
