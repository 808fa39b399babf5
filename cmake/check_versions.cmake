# Sets extension_name, by which python/mlx_fused_optimizers/_extension.py finds the
# extension for an MLX, and checks that the nanobind is that MLX's.

set(mlx_version ${MLX_FUSED_MLX_VERSION})
if(NOT mlx_version)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "from importlib.metadata import version; print(version('mlx'))"
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE mlx_version
    COMMAND_ERROR_IS_FATAL ANY)
endif()
string(REGEX REPLACE "[^0-9A-Za-z]" "_" extension_name "_ext_${mlx_version}")

execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import sysconfig; print(sysconfig.get_config_var('Py_GIL_DISABLED') or 0)"
  OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE is_free_threaded
  COMMAND_ERROR_IS_FATAL ANY)
if(is_free_threaded)
  message(FATAL_ERROR "free-threaded Python is not supported")
endif()

file(READ ${CMAKE_CURRENT_LIST_DIR}/mlx_versions.json versions)
string(JSON nanobind_needed ERROR_VARIABLE unknown
  GET "${versions}" "${mlx_version}" nanobind)
if(unknown)
  message(WARNING "MLX ${mlx_version} is not in cmake/mlx_versions.json: that nanobind "
    "${nanobind_VERSION} is the one it was built with shows only when it is imported")
elseif(NOT nanobind_needed VERSION_EQUAL nanobind_VERSION)
  message(FATAL_ERROR "MLX ${mlx_version} needs nanobind ${nanobind_needed}, found "
    "${nanobind_VERSION}; run: pip install nanobind==${nanobind_needed}")
endif()
