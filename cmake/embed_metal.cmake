# Writes a header in which each kernel source of metal/ is a string, with the
# project's own includes put in place: Metal compiles it at run time, on a
# machine where these files do not lie.
#   cmake -DSOURCE_DIR=... -DOUTPUT=... -P embed_metal.cmake
function(inline_includes path result)
  file(READ ${path} text)
  string(REGEX MATCHALL "#include \"[a-z_]+\\.h\"\n" includes "${text}")
  foreach(include IN LISTS includes)
    string(REGEX REPLACE "#include \"(.*)\"\n" "\\1" name "${include}")
    inline_includes(${SOURCE_DIR}/${name} body)
    string(REPLACE "${include}" "${body}" text "${text}")
  endforeach()
  set(${result} "${text}" PARENT_SCOPE)
endfunction()

set(header "// Made by cmake/embed_metal.cmake from metal/.\n#pragma once\n#include <string>\n\nnamespace mlx_fused {\n")
foreach(name fused_update sums copy_array factored)
  inline_includes(${SOURCE_DIR}/${name}.metal source)
  if(source MATCHES "[^\t\n -~]")
    message(FATAL_ERROR "${name}.metal or an include of it: MLX gives Metal ASCII")
  endif()
  string(APPEND header
    "inline const std::string ${name}_source = R\"metal(${source})metal\";\n")
endforeach()
string(APPEND header "}  // namespace mlx_fused\n")
file(WRITE ${OUTPUT} "${header}")
