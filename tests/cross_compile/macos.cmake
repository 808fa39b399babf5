# CMake's toolchain file: the clang of the PyPI package ziglang, for arm64 macOS 14.
# cross_compile.py gives ZIG, the package's program.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_CXX_COMPILER ${ZIG} c++)
set(CMAKE_CXX_ARCHIVE_CREATE "\"${ZIG}\" ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "\"${ZIG}\" ranlib <TARGET>")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG)

# Zig's own libc++ is linked statically and always has its newest functions; the
# Mac's has those of its release, and what libmlx throws has that one's types. So
# its headers are told that they are for Apple's: what macOS 14 lacks is then
# marked unavailable, and exceptions' types are visible outside.
string(JOIN " " CMAKE_CXX_FLAGS_INIT
  -target aarch64-macos.14.0 -g0
  -U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS
  -D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1
  -U_LIBCPP_DISABLE_VISIBILITY_ANNOTATIONS
  -U_LIBCXXABI_DISABLE_VISIBILITY_ANNOTATIONS
  -Wunguarded-availability
  "-include \"${CMAKE_CURRENT_LIST_DIR}/include/macos_pyconfig.h\"")
# Apple's frameworks, of which the package has no headers.
set(CMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES ${CMAKE_CURRENT_LIST_DIR}/include)
