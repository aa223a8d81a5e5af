# Finds LibTorch 2.11 and defines the imported targets Perseid::c10 and Perseid::torch_cpu, and
# Perseid::libtorch that links both. LibTorch's own CMake files are not used: those of a CUDA wheel
# stop on a machine without a CUDA toolkit. Installed beside PerseidConfig.cmake, which includes it.
set(PERSEID_TORCH_VERSION 2.11)
set(PERSEID_TORCH_DIR "" CACHE PATH "Folder of LibTorch, with include/ and lib/ below it")

if(PERSEID_TORCH_DIR)
  set(perseid_torch_places "${PERSEID_TORCH_DIR}")
else()
  file(GLOB perseid_torch_places
    "${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch")
  foreach(prefix IN LISTS CMAKE_PREFIX_PATH)
    # torch.utils.cmake_prefix_path is TORCH/share/cmake
    list(APPEND perseid_torch_places "${prefix}" "${prefix}/../..")
  endforeach()
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
  message(FATAL_ERROR "Perseid needs LibTorch ${PERSEID_TORCH_VERSION} and found none in: ${places}\n"
    "Install it with cmake/setup.sh, or set -DPERSEID_TORCH_DIR=<folder with include/ and lib/>")
endif()

# Versions before 2.9 keep their numbers in another header; read whichever is there.
set(perseid_torch_found "unknown")
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
if(NOT perseid_torch_found MATCHES "^2\\.11\\.")
  message(FATAL_ERROR "Perseid needs LibTorch ${PERSEID_TORCH_VERSION}, but ${perseid_torch} is "
    "LibTorch ${perseid_torch_found}; set -DPERSEID_TORCH_DIR=<folder of LibTorch ${PERSEID_TORCH_VERSION}>")
endif()
message(STATUS "LibTorch ${perseid_torch_found}: ${perseid_torch}")

foreach(library IN ITEMS c10 torch_cpu)
  if(NOT TARGET Perseid::${library})
    add_library(Perseid::${library} SHARED IMPORTED)
    set_target_properties(Perseid::${library} PROPERTIES
      IMPORTED_LOCATION "${perseid_torch}/lib/lib${library}.so"
      INTERFACE_INCLUDE_DIRECTORIES
        "${perseid_torch}/include;${perseid_torch}/include/torch/csrc/api/include")
  endif()
endforeach()
if(NOT TARGET Perseid::libtorch)
  add_library(Perseid::libtorch INTERFACE IMPORTED)
  # The libraries behind torch_cpu (CUDA runtime, CUPTI) are found by its own run path.
  set_target_properties(Perseid::libtorch PROPERTIES
    INTERFACE_LINK_LIBRARIES "Perseid::torch_cpu;Perseid::c10"
    INTERFACE_LINK_OPTIONS "LINKER:--unresolved-symbols=ignore-in-shared-libs")
endif()
