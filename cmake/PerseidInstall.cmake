# cmake --install: static libraries, public headers below include/perseid, package files. The tree may
# be moved afterwards: no file in it holds a path of this machine.
include(CMakePackageConfigHelpers)
set(perseid_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/Perseid")

# Headers that only their own folder and its tests may include; no public header includes them.
file(STRINGS "${PROJECT_SOURCE_DIR}/cmake/private_headers.txt" private_headers REGEX "^[^#]")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/cmake/private_headers.txt")
list(TRANSFORM private_headers REPLACE "(.+)" "PATTERN;\\1;EXCLUDE")

foreach(folder IN ITEMS kernels comm gates moe)
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/${folder}"
    DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/perseid"
    FILES_MATCHING PATTERN "*.h" PATTERN "moe/ops" EXCLUDE ${private_headers})
  install(TARGETS perseid_${folder} EXPORT PerseidTargets
    ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
endforeach()
if(TARGET perseid_ops)
  install(TARGETS perseid_ops LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
endif()
install(EXPORT PerseidTargets NAMESPACE Perseid:: DESTINATION "${perseid_package_dir}")

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/PerseidConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/PerseidConfig.cmake" INSTALL_DESTINATION "${perseid_package_dir}"
  NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/PerseidConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES
  "${PROJECT_BINARY_DIR}/PerseidConfig.cmake"
  "${PROJECT_BINARY_DIR}/PerseidConfigVersion.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/PerseidLibTorch.cmake"
  DESTINATION "${perseid_package_dir}")
