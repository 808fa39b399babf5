// What Python's public headers ask of pyconfig.h, for arm64 macOS. It is
// included first, and its guard keeps out that of the running Python, which
// describes another machine. Python.h itself is the same on all.
#define Py_PYCONFIG_H

#define SIZEOF_INT 4
#define SIZEOF_LONG 8
#define SIZEOF_LONG_LONG 8
#define SIZEOF_PID_T 4
#define SIZEOF_SIZE_T 8
#define SIZEOF_VOID_P 8
#define SIZEOF_WCHAR_T 4
#define ALIGNOF_MAX_ALIGN_T 8

#define HAVE_CLOCK_GETTIME 1
#define HAVE_COPYSIGN 1
#define HAVE_DECL_ISFINITE 1
#define HAVE_DECL_ISINF 1
#define HAVE_DECL_ISNAN 1
#define HAVE_ERRNO_H 1
#define HAVE_FORK 1
#define HAVE_HYPOT 1
#define HAVE_PTHREAD_H 1
#define HAVE_ROUND 1
#define HAVE_SSIZE_T 1
#define HAVE_STDDEF_H 1
#define HAVE_SYS_SELECT_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_SYS_TIME_H 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_THREAD_LOCAL 1
#define HAVE_WCHAR_H 1
#define WITH_DOC_STRINGS 1
#define WITH_PYMALLOC 1
#define WITH_THREAD 1

static_assert(sizeof(long) == SIZEOF_LONG && sizeof(void*) == SIZEOF_VOID_P &&
              sizeof(wchar_t) == SIZEOF_WCHAR_T &&
              alignof(long double) == ALIGNOF_MAX_ALIGN_T);
