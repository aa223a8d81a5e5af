# perseid_add_library(folder SOURCES ... LINKS ...): one target for each folder, Perseid::folder.
include(GNUInstallDirs)

add_library(perseid_warnings INTERFACE)
target_compile_options(perseid_warnings INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Werror)
if(PERSEID_SANITIZE)
  string(REPLACE ";" "," perseid_sanitize "${PERSEID_SANITIZE}")
  add_compile_options(-fsanitize=${perseid_sanitize} -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${perseid_sanitize})
endif()

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
endfunction()
