# Read after project(): what zig's linker wants otherwise than Apple's.
# cross_compile.py gives STUBS, the libraries of macOS to link with, and may give
# EXTRA_SOURCE, a file to build into the extension.
set(CMAKE_SHARED_MODULE_CREATE_CXX_FLAGS -shared)  # it has no -bundle

function(adapt_extension)
  # Python's symbols are found when the module is loaded. nanobind has a list of
  # them for Apple's linker; cross_compile.py checks against it.
  set_property(TARGET _ext PROPERTY LINK_OPTIONS
    -nostdlib++ -undefined dynamic_lookup -Wl,-dead_strip -Wl,-S)
  # MLX names its frameworks by their path in Xcode. No symbol of theirs is used.
  set_property(TARGET mlx PROPERTY INTERFACE_LINK_LIBRARIES)
  target_link_libraries(_ext PRIVATE ${STUBS})
  if(EXTRA_SOURCE)
    target_sources(_ext PRIVATE ${EXTRA_SOURCE})
    set_property(TARGET _ext PROPERTY OUTPUT_NAME ${extension_name}_with_extra_source)
  endif()
endfunction()
cmake_language(DEFER CALL adapt_extension)
