"""Compiles Metal Shading Language (MSL) to a shared library for the simulator.

Clang, as the PyPI package ziglang brings it, reads MSL as C++ for OpenCL (see
msl/language). Each load and store of the kernel then calls the simulator:
-fsanitize=kernel-address puts the calls there, -fsanitize=alignment and bounds
add what only the compiler knows.

The preprocessed text is changed in five ways, because no macro can do it:

- ``template [[host_name("x")]] [[kernel]] decltype(f<T>) f<T>;`` loses its
  attributes, which C++ does not allow there; the name "x" is kept for a table.
- ``[[kernel]]`` and ``kernel`` go: a kernel of OpenCL cannot be a template.
- ``threadgroup T a[n];`` in a function becomes a reference to memory that the
  simulator gives: OpenCL allows such variables in its own kernels only.
- ``thread`` after a method's parameters goes, and with it the check that its
  object is a thread's: OpenCL gives temporary objects no address space.
- ``#pragma METAL fp contract(off)`` becomes clang's own.

So that line numbers stay, no line is added before the text's end.

Run as a program it reads MSL from standard input and prints the path of the
library, or the compiler's message and exits with 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SHIM = Path(__file__).resolve().parent / "msl"

LANGUAGE = [
    *("-x", "clcpp", "-cl-std=CLC++2021", "-cl-no-stdinc"),
    # No `double`, as in MSL; and literals without a suffix are float, also in
    # templates, where the first option alone would leave them double.
    *("-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64", "-Xclang", "-mdouble=32"),
    "-w",  # the Mac's compiler is the judge of style
]
FLAGS = [
    *LANGUAGE,
    # The same arithmetic as the C++ of the CPU.
    *("-ffp-contract=off", "-fno-math-errno", "-cl-fp32-correctly-rounded-divide-sqrt"),
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
    # No vectorising and no loops turned into memcpy: an access of the kernel
    # stays one access.
    *("-O2", "-fno-vectorize", "-fno-slp-vectorize", "-fno-builtin"),
    *("-fPIC", "-gline-tables-only", "-gdwarf-4", "-fasynchronous-unwind-tables"),
    "-fsanitize=kernel-address,alignment,bounds",
    "-fsanitize-recover=alignment,bounds",
    *("-mllvm", "-asan-instrumentation-with-call-threshold=0"),
    *("-mllvm", "-asan-opt=0", "-mllvm", "-asan-stack=0", "-mllvm", "-asan-globals=0"),
    *("-mllvm", "-asan-kernel-mem-intrinsic-prefix=1"),
    # Not AddressSanitizer's own names: it may watch over the simulator.
    *("-mllvm", "-asan-memory-access-callback-prefix=simulator_"),
]

# MSL before 4.0 is C++14, which clang cannot read together with the address spaces
# of C++ for OpenCL. It can warn of what is newer.
NEWER_THAN_CPP14 = [
    *("-Wno-everything", "-Wpre-c++17-compat", "-fno-caret-diagnostics"),
    *("-Wc++20-extensions", "-Wc++20-designator"),
    *("-Wc++23-extensions", "-Wc++26-extensions"),
]
# Of that, what kernels that MLX ships use, and so Apple's compiler takes.
PRECEDENTED = ("constexpr if ", "'static_assert' with no message ")

# What a GPU may do instead. The standard library's part is in msl/metal_stdlib,
# and flushing subnormal numbers is the launch's.
UNKIND_FLAGS = [
    # Also across statements, but not where a pragma turns it off.
    "-ffp-contract=fast-honor-pragmas",
    *(["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []),
    "-DSIMULATOR_UNKIND=1",
]

# The order is that of simulator::Arguments and of Attribute in simulator.h.
ATTRIBUTES = [
    "thread_position_in_grid",
    "threadgroup_position_in_grid",
    "thread_position_in_threadgroup",
    "thread_index_in_threadgroup",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "simdgroup_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "threads_per_simdgroup",
    "simdgroups_per_threadgroup",
]


# [[kernel]], [[kernel, max_total_threads_per_threadgroup(64)]] or kernel
KERNEL = r"(?:\[\[\s*kernel\b[^\]]*\]\]|\bkernel\b(?=\s+void\b))"


class CompileError(RuntimeError):
    """Clang refused the source; the text is its message."""


@dataclass(frozen=True)
class Kernel:
    name: str  # what the host asks for
    function: str  # what C++ calls it, with its template arguments
    parameters: list[str]  # their text, with attributes


def compile_kernels(
    source: str,
    name: str = "kernel",
    include: tuple[str, ...] = (),
    unkind: bool = False,
) -> Path:
    """Returns the shared library of the kernels in `source`; `name` names its lines.

    With `unkind` they do the arithmetic that a GPU may do, not that of the CPU. A
    folder MLX_FUSED_SIMULATOR_SOURCES gets the source as `name`.metal.
    """
    if folder := os.environ.get("MLX_FUSED_SIMULATOR_SOURCES"):
        Path(folder, f"{name}.metal").write_text(source)
    arithmetic = [*FLAGS, *(UNKIND_FLAGS if unkind else [])]
    flags = [*arithmetic, *include_flags(include)]
    text = preprocess(source, name, flags)
    version = importlib.metadata.version("ziglang")
    recipe = "\0".join([text, *arithmetic, version, Path(__file__).read_text()])
    library = cache_folder() / f"{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        unit = rewrite(text, unkind)
        warning = [flag for flag in flags if flag != "-w"]
        # Made under another name: two processes may do this at once.
        with (
            tempfile.TemporaryDirectory(dir=library.parent) as scratch,
            ThreadPoolExecutor(1) as pool,
        ):
            machine = Path(scratch, "kernels.so")
            # What it refuses is told before what the compiler does.
            checked = pool.submit(check, unit, [*warning, *NEWER_THAN_CPP14])
            try:
                build(unit, flags, machine)
            finally:
                checked.result()
            os.replace(machine, library)
    return library


def check(unit: str, flags: list[str]) -> None:
    """Refuses what clang takes and the Mac's compiler does not."""
    syntax = ["-fsyntax-only", "-Xclang", "-ast-dump", "-"]
    tree, warnings = zig_with_warnings(["clang", *flags, *syntax], unit)
    check_language(warnings)
    check_address_spaces(tree)


def build(unit: str, flags: list[str], machine: Path) -> None:
    plain = ["-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes"]
    llvm = check_copies(zig(["clang", *flags, *plain, "-o", "-", "-"], unit))
    code = machine.with_suffix(".o")
    zig(["clang", *flags, "-x", "ir", "-c", "-o", str(code), "-"], llvm)
    zig(["ld.lld", "-shared", "--eh-frame-hdr", "-o", str(machine), str(code)])


def include_flags(include: tuple[str, ...]) -> list[str]:
    return [f"-I{SHIM}", *(f"-I{directory}" for directory in include)]


def preprocess(source: str, name: str, flags: list[str]) -> str:
    return zig(
        ["clang", *flags, "-E", "-include", str(SHIM / "language"), "-"],
        f'#line 1 "{name}.metal"\n{source}\n'
        "#include <metal_stdlib>\n#include <launch>\n",
    )


def cache_folder() -> Path:
    default = Path(tempfile.gettempdir(), f"mlx_fused_simulator_{os.getuid()}")
    folder = Path(os.environ.get("MLX_FUSED_SIMULATOR_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rewrite(text: str, unkind: bool = False) -> str:
    """Preprocessed MSL -> C++ for OpenCL, with an entry for each kernel."""
    # A pragma that allows contraction must not bring it back in the kind mode.
    text, kernels = without_metal(text, "off|on|fast" if unkind else "off")
    return text + _entries(kernels, unkind)


def without_metal(text: str, contraction: str) -> tuple[str, list[Kernel]]:
    """Preprocessed MSL -> C++ for OpenCL, and its kernels.

    `contraction` is the modes of the pragma that are passed on, as in ``off|fast``.
    """
    declared: dict[str, list[str]] = {}
    for match in re.finditer(rf"{KERNEL}\s+void\s+(\w+)\s*\(", text):
        between, _ = _bracketed(text, match.end() - 1)
        declared[match[1]] = _split(_without_markers(between))
    kernels: list[Kernel] = []

    def instantiation(match: re.Match[str]) -> str:
        name = "".join(re.findall(r'"([^"]*)"', match[1]))
        declaration = re.sub(KERNEL, "", _without_markers(match[2]))
        function = _declared_function(" ".join(declaration.split()))
        if _name(function) not in declared:
            raise CompileError(f"{name}: no [[kernel]] {_name(function)} is declared")
        kernels.append(Kernel(name, function, declared[_name(function)]))
        return f"template {match[2]}"

    host_name = r'host_name\s*\(\s*((?:"[^"]*"\s*)+)\)'
    text = re.sub(rf"template\s*\[\[\s*{host_name}\s*\]\]([^;]*)", instantiation, text)
    for name, parameters in declared.items():
        # Templates that nobody instantiates have no name for the host.
        if not re.search(rf">\s*{KERNEL}\s+void\s+{name}\b", text):
            kernels.append(Kernel(name, name, parameters))

    text = re.sub(KERNEL, "", text)
    method = r"(\)\s*(?:const\s*)?)__private\b(?=\s*(?:const\s*)?[:{;])"
    text = re.sub(method, r"\1", text)
    sites = iter(range(1 << 30))
    text = re.sub(
        r"\b__local\s+([\w:<>]+(?:\s[\w:<>]+)*)\s+(\w+)((?:\s*\[[^\]\n]*\])*)\s*;",
        lambda m: (
            f"__local {m[1]} (&{m[2]}){m[3]} = "
            f"simulator::threadgroup_variable<{m[1]}{m[3]}, {next(sites)}>();"
        ),
        text,
    )
    pragma = rf"(?m)^(\s*#\s*pragma )METAL( fp contract\s*\((?:{contraction})\))"
    return re.sub(pragma, r"\1clang\2", text), kernels


def check_language(warnings: str) -> None:
    """Refuses what C++14 has not, going by clang's warnings of it."""
    for line in warnings.splitlines():
        found = re.match(r"(.*?:\d+:\d+): warning: (.*) \[-W", line)
        if found is None or "/mlx/backend/metal/kernels/" in found[1]:
            continue
        if not found[2].startswith(PRECEDENTED):
            raise CompileError(
                f"{found[1]}: error: {found[2]}; MSL before 4.0 is C++14"
            )


def check_address_spaces(tree: str) -> None:
    """Refuses what C++ for OpenCL allows and MSL does not: to convert a pointer
    or reference into memory to one that names no address space, and so is a
    thread's. Objects of methods and of copies are converted so by the compiler
    itself, in MSL too.
    """
    scalar = r"(?:float|half|__bf16|bool|(?:unsigned )?(?:char|short|int|long))"
    conversion = re.compile(
        rf"'(?:const )?__generic (?:[^']*\*|{scalar})'"
        r"(?: lvalue)? <AddressSpaceConversion>"
    )
    lines = tree.splitlines()
    for i, line in enumerate(lines):
        # Most lines are none of these, and dear to search.
        if "<AddressSpaceConversion>" not in line or not conversion.search(line):
            continue
        child = lines[i + 1] if i + 1 < len(lines) else ""
        source = re.search(r"'[^']*__(global|local|constant)\b", child)
        if source and "MemberExpr" not in lines[i - 1]:
            raise CompileError(
                f"{_place(lines[: i + 1])}: error: a pointer or reference to "
                f"__{source[1]} memory becomes one that names no address space: "
                "`thread` in MSL"
            )


def _place(lines: list[str]) -> str:
    """File and line of the last node: one gives them only where they change."""
    file = number = ""
    for line in lines:
        if place := re.search(r"<(?:line|([^<>:]+)):(\d+):", line):
            file, number = place[1] or file, place[2]
    return f"{file}:{number}"


def check_copies(llvm: str) -> str:
    """Adds the alignment check of structs that are copied as a whole.

    -fsanitize=alignment checks all other accesses. A thread's own variables are
    left out: they are aligned, and passing on their address would keep them from
    becoming registers.
    """
    lines = []
    own: set[str] = set()
    for line in llvm.splitlines():
        if line.startswith("define "):
            own = set()
        elif variable := re.match(r"\s+(%\S+) = alloca ", line):
            own.add(variable[1])
        elif " call void @llvm.memcpy." in line:
            place = "".join(re.findall(r", !dbg !\d+", line))
            for alignment, pointer in re.findall(r"ptr align (\d+) (%[\w.]+)", line):
                if pointer not in own:
                    check = f"@simulator_copy_aligned(ptr {pointer}, i64 {alignment})"
                    lines.append(f"  call void {check}{place}")
        lines.append(line)
    return "\n".join([*lines, "declare void @simulator_copy_aligned(ptr, i64)", ""])


def _entries(kernels: list[Kernel], unkind: bool) -> str:
    """What simulator.h's Library looks up: names, buffers and a call of each kernel."""
    # decltype(f) of a function counts as taking its address.
    pragma = "#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable"
    names = "".join(f"{kernel.name}\\n" for kernel in kernels)
    lines = ["", '# 1 "entries"', pragma, 'extern "C" {']
    lines.append(f'extern constant char simulator_kernels[] = "{names}";')
    lines.append(f"extern constant int simulator_unkind = {int(unkind)};")
    unchecked = '__attribute__((no_sanitize("kernel-address", "alignment", "bounds")))'
    for number, kernel in enumerate(kernels):
        call, table = call_of(kernel, "a->attributes")
        signature = f"simulator_entry_{number}(const simulator::Arguments* a)"
        lines += [
            f"extern constant int simulator_parameters_{number}[] = {{",
            f"  {', '.join([*table, '-1'])}}};",
            f"{unchecked} void {signature} {{",
            f"  {call};",
            "}",
        ]
    return "\n".join([*lines, "}", ""])


def call_of(kernel: Kernel, attributes: str) -> tuple[str, list[str]]:
    """The call of a kernel with simulator::Arguments `a`, and its buffers.

    `attributes` is where the thread's attributes stand.
    """
    traits = f"simulator::Kernel<decltype({kernel.function})>"
    arguments, table, index = [], [], {"buffer": 0, "threadgroup": 0}
    for n, parameter in enumerate(kernel.parameters):
        attribute = re.search(r"\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*\]\]", parameter)
        if attribute and attribute[1] in ATTRIBUTES:
            which = ATTRIBUTES.index(attribute[1])
            arguments.append(f"{traits}::attribute<{n}>({attributes}[{which}])")
            continue
        kind = attribute[1] if attribute else "buffer"
        if kind == "__local":  # what the macro `threadgroup` made of it
            kind = "threadgroup"
        if kind not in index:
            raise CompileError(f"{kernel.name}: [[{kind}]] is not simulated")
        if attribute:
            index[kind] = int(attribute[2], 0)
        table.append(f"{index[kind]}, {traits}::space<{n}>()")
        address = f"a->{kind}s[{index[kind]}]"
        arguments.append(f"{traits}::buffer<{n}>::from({address})")
        index[kind] += 1
    return f"{kernel.function}({', '.join(arguments)})", table


def _declared_function(declaration: str) -> str:
    """'decltype(f<T>) f<T>' or 'void f<T>(...)' -> 'f<T>'"""
    if declaration.startswith("decltype"):
        _, end = _bracketed(declaration, declaration.index("("))
        return declaration[end:].strip()
    return re.sub(r"^void\s+", "", declaration).split("(")[0].strip()


def _name(function: str) -> str:
    """'f<T>' -> 'f'"""
    return re.split(r"\W", function, maxsplit=1)[0]


def _without_markers(text: str) -> str:
    """Preprocessed text without its line markers."""
    return re.sub(r"(?m)^#.*$", "", text)


def _bracketed(text: str, start: int) -> tuple[str, int]:
    """What stands between the parenthesis at `start` and its partner, and the end."""
    depth = 0
    for end in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 1 : end], end + 1
    raise CompileError("a parenthesis is not closed")


def _split(parameters: str) -> list[str]:
    """The parameters of a function, at the commas outside of all brackets."""
    parts, depth = [""], 0
    for character in parameters:
        depth += (character in "(<[{") - (character in ")>]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def zig(arguments: list[str], text: str = "") -> str:
    return zig_with_warnings(arguments, text)[0]


def zig_with_warnings(arguments: list[str], text: str) -> tuple[str, str]:
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        raise CompileError("the simulator needs clang: pip install ziglang")
    program = str(Path(package.origin).parent / "zig")
    done = subprocess.run(
        [program, *arguments], input=text, capture_output=True, text=True
    )
    if done.returncode:
        raise CompileError(done.stderr.strip())
    return done.stdout, done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile MSL for the simulator.")
    parser.add_argument("--name", default="kernel")
    parser.add_argument("-I", dest="include", action="append", default=[])
    parser.add_argument("--unkind", action="store_true")
    options = parser.parse_args()
    try:
        include = tuple(options.include)
        print(compile_kernels(sys.stdin.read(), options.name, include, options.unkind))
    except CompileError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
