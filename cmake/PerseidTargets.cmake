# perseid_add_library(folder SOURCES ... LINKS ...): one target for each folder, Perseid::folder.
# perseid_precompile(target ...): compiles them as LibTorch wants it, its headers read from one
# precompiled header.
# perseid_group_sources(target): its files are compiled in groups, see PERSEID_UNITY_BUILD.
include(GNUInstallDirs)

add_library(perseid_warnings INTERFACE)
set(cxx_warnings -Wall -Wextra -Wpedantic -Wshadow $<$<BOOL:${PROJECT_IS_TOP_LEVEL}>:-Werror>)
target_compile_options(perseid_warnings INTERFACE $<$<COMPILE_LANGUAGE:C,CXX>:${cxx_warnings}>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${PROJECT_IS_TOP_LEVEL}>>:-Werror=all-warnings>)
if(PERSEID_SANITIZE)
  string(REPLACE ";" "," perseid_sanitize "${PERSEID_SANITIZE}")
  add_compile_options(-fsanitize=${perseid_sanitize} -fno-sanitize-recover=all
    -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${perseid_sanitize})
endif()

# The header costs about 25 s once and saves 5 s in each file that declares a module. OpenMP is
# LibTorch's thread pool: without it at::parallel_for, which is inline, runs on one thread.
function(perseid_precompile)
  if(NOT TARGET perseid_torch_headers)
    set(empty "${PROJECT_BINARY_DIR}/torch_headers.cpp")
    file(CONFIGURE OUTPUT "${empty}" CONTENT "// Owner of the precompiled header.\n")
    add_library(perseid_torch_headers OBJECT EXCLUDE_FROM_ALL "${empty}")
    target_link_libraries(perseid_torch_headers PRIVATE Perseid::libtorch perseid_warnings)
    target_compile_options(perseid_torch_headers PRIVATE -fopenmp)
    target_precompile_headers(perseid_torch_headers PRIVATE
      <ATen/ATen.h> <torch/nn/module.h> <torch/csrc/autograd/custom_function.h>)
  endif()
  foreach(target IN LISTS ARGN)
    target_precompile_headers(${target} REUSE_FROM perseid_torch_headers)
    # A precompiled header serves one kind of code only: that of libraries, in programs too.
    set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
    target_compile_options(${target} PRIVATE -fopenmp -fPIC)
  endforeach()
endfunction()

# Templates that LibTorch's headers need are instantiated anew in each translation unit, in 3.5 s, more
# than our own code takes. Names of unnamed namespaces must therefore differ within a folder.
function(perseid_group_sources target)
  set_target_properties(${target} PROPERTIES
    UNITY_BUILD ${PERSEID_UNITY_BUILD} UNITY_BUILD_MODE BATCH UNITY_BUILD_BATCH_SIZE 8)
endfunction()

function(perseid_add_library folder)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINKS;PRIVATE_LINKS" ${ARGN})
  add_library(perseid_${folder} STATIC ${ARG_SOURCES})
  add_library(Perseid::${folder} ALIAS perseid_${folder})
  set_target_properties(perseid_${folder} PROPERTIES EXPORT_NAME ${folder})
  target_include_directories(perseid_${folder} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/perseid>)
  target_compile_features(perseid_${folder} PUBLIC cxx_std_20)
  target_link_libraries(perseid_${folder}
    PUBLIC ${ARG_LINKS}
    PRIVATE ${ARG_PRIVATE_LINKS} $<BUILD_INTERFACE:perseid_warnings>)
  if("Perseid::libtorch" IN_LIST ARG_LINKS)
    perseid_precompile(perseid_${folder})
    perseid_group_sources(perseid_${folder})
  endif()
endfunction()
