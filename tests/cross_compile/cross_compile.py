"""Builds the wheel for arm64 macOS on any machine, and checks what it needs there.

    python tests/cross_compile/cross_compile.py --output build/cross

The project's own CMakeLists.txt is configured for Darwin, with clang from the PyPI
package ziglang and with MLX's macOS wheels: their headers, and libmlx.dylib to link
with. Python's headers are those of the running Python, which the wheel is then for;
include/macos_pyconfig.h stands in for the one of them that differs on a Mac. This is
done for each MLX of cmake/mlx_versions.json, and the wheels are merged into one.

Then every symbol that an extension asks for must be one that the library it is bound
to has on macOS 14, where the Mac's loader will look for it.

How is known what a library has:

- libmlx: it is here.
- libSystem: ziglang ships Apple's list, which is of a later macOS; what is newer than
  macOS 14 the headers mark, and the compiler refuses.
- libc++ and libobjc: what MLX's libraries import, which are built for macOS 14, those
  of the newest MLX too; and LIBCXX below. The extension is linked with stubs that
  hold just that.
- Python: nanobind's list for Apple's linker, and the running Python must have it too.

An exception is caught by its type, which must be the same one in the library that
throws it: those of the C++ library are imported from it, or, where it has none to
import, compared by name (see check_exceptions). And an arm64 Mac loads only signed
code: the linker signs what it writes, so nothing may change a byte of it afterwards.

Nothing is run: whether the Mac's loader agrees, and what the kernels do, it cannot
tell.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import lief

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "cmake"))
sys.path.append(str(ROOT / "tests"))

import mlx_versions  # noqa: E402
from build_wheels import PYTHON as PYTHON_VERSION  # noqa: E402
from build_wheels import BuildError, fetch, merge  # noqa: E402
from metal_simulator.macos_wheels import macos_wheels  # noqa: E402

MACOS = [14, 0, 0]
MLX = "@rpath/libmlx.dylib"
SYSTEM = "/usr/lib/libSystem.B.dylib"
CXX = "/usr/lib/libc++.1.dylib"
OBJC = "/usr/lib/libobjc.A.dylib"
PYTHON = "Python"
WEAK_REFERENCE = 0x40  # N_WEAK_REF: the library may lack it

# What macOS 14's libc++ has although MLX's libraries do not import it.
LIBCXX = {
    "__ZdlPvm",  # sized delete: clang calls it from macOS 10.12 on
    "__ZdlPvmSt11align_val_t",  # and with an alignment from 10.13 on
    "__ZTINSt3__112system_errorE",  # as old as libc++; caught in parallel.cpp
}

lief.logging.disable()


class CrossCompileError(RuntimeError):
    """It did not compile, or would not load on macOS 14; the text says why."""


@dataclass(frozen=True)
class Result:
    mlx: str  # the version
    wheel: Path
    library: Path  # the extension in it
    sources: list[str]  # those compiled for it
    symbols: dict[str, int]  # resolved, by library

    def __str__(self) -> str:
        libraries = ", ".join(f"{name} {n}" for name, n in self.symbols.items())
        return (
            f"cross-compile for MLX {self.mlx}: {len(self.sources)} files compiled, "
            f"1 library linked, {sum(self.symbols.values())} symbols resolved "
            f"({libraries})"
        )


def cross_compile_every(
    output: Path, wheels: Path | None = None, releases: list[str] | None = None
) -> Path:
    """The wheel for every MLX, or these; in the folder `wheels`, or one in `output`.

    Raises:
        CrossCompileError: as cross_compile.
        BuildError: the wheels are not alike.
    """
    results = []
    for version in releases or mlx_versions.releases_for(PYTHON_VERSION):
        results.append(cross_compile(output, version))
        print(results[-1], flush=True)
    wheel = merge([x.wheel for x in results], wheels or output / "wheels")
    print(
        f"cross-built, not run on a Mac: {wheel}, {wheel.stat().st_size / 1e6:.2f} MB"
    )
    return wheel


def cross_compile(
    output: Path,
    version: str = mlx_versions.NEWEST,
    extra_source: Path | None = None,
) -> Result:
    """Builds for one MLX and checks, in a folder of its own of `output`.

    An earlier build there is continued.

    Raises:
        CrossCompileError: with the compiler's message, or what does not fit.
    """
    output = output.resolve() / version
    output.mkdir(parents=True, exist_ok=True)
    wheels = output / ("trial" if extra_source else "wheel")
    nanobind = f"nanobind=={mlx_versions.RELEASES[version]['nanobind']}"
    packages = fetch(nanobind.replace("==", "-"), [nanobind])
    mlx = macos_wheels(version) / "mlx"
    exports = known_exports(mlx, packages / "nanobind")
    stubs = [write_stub(output, name, exports[name]) for name in (CXX, OBJC)]
    definitions = {
        "CMAKE_TOOLCHAIN_FILE": HERE / "macos.cmake",
        "CMAKE_PROJECT_INCLUDE": HERE / "extension.cmake",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",  # changing it would undo the signature
        "CMAKE_COMPILE_WARNING_AS_ERROR": "ON",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "EXTRA_SOURCE": extra_source.resolve() if extra_source else "",
        "MLX_DIR": mlx / "share/cmake/MLX",
        "MLX_FUSED_MLX_VERSION": version,
        "MLX_LIBRARY": mlx / "lib/libmlx.dylib",
        "STUBS": ";".join(map(str, stubs)),
        "ZIG": package_folder("ziglang") / "zig",
    }
    settings = {f"cmake.define.{name}": str(x) for name, x in definitions.items()}
    settings["build-dir"] = str(output)
    settings["install.strip"] = "false"  # so would this
    soabi = f"cpython-{sys.version_info[0]}{sys.version_info[1]}-darwin"
    program = (
        "import json, sys\n"
        "from scikit_build_core.build import build_wheel\n"
        "print(build_wheel(sys.argv[1], json.loads(sys.argv[2])))"
    )
    messages = run(
        *(sys.executable, "-c", program, str(wheels), json.dumps(settings)),
        PYTHONPATH=str(packages),
        _PYTHON_HOST_PLATFORM=f"macosx-{MACOS[0]}.{MACOS[1]}-arm64",
        SETUPTOOLS_EXT_SUFFIX=f".{soabi}.so",
    )
    wheel = wheels / messages[-1].strip()

    name = f"_ext_{version.replace('.', '_')}"
    library = (
        output / f"{name}{'_with_extra_source' if extra_source else ''}.{soabi}.so"
    )
    installed = zipfile.ZipFile(wheel).read(f"mlx_fused_optimizers/{library.name}")
    if installed != library.read_bytes():
        raise CrossCompileError(f"{library.name} was changed after it was linked")
    commands = json.loads((output / "compile_commands.json").read_text())
    sources = [os.path.relpath(command["file"], ROOT) for command in commands]
    symbols = check(library, f"_PyInit_{name}", exports)
    return Result(version, wheel, library, sources, symbols)


def check(library: Path, entry: str, exports: dict[str, set[str]]) -> dict[str, int]:
    """How many symbols of each library it uses; all that does not fit is raised."""
    binary = parse(library)
    libraries, rpaths = linked(binary), [str(x.path) for x in binary.rpaths]
    facts = {
        "is not for arm64": binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64,
        "is not for macOS 14.0": minimum_macos(binary) == MACOS,
        f"loads {libraries}": set(libraries) == {MLX, SYSTEM, CXX, OBJC},
        f"finds libmlx in {rpaths}": rpaths == ["@loader_path/../mlx/lib"],
        f"has no {entry}": entry in names(binary.exported_symbols),
    }
    faults = [fault for fault, right in facts.items() if not right]
    faults += check_exceptions(binary) + check_signature(library, binary)

    counts: Counter[str] = Counter()
    origins = {str(x.name): origin(x, libraries) for x in undefined(binary)}
    for name, place in sorted(origins.items()):
        if name in exports.get(place, ()):
            counts[Path(place).name.split(".")[0]] += 1
        elif place == PYTHON:  # the linker had found it nowhere
            faults.append(f"{name} is not in macOS 14, MLX or Python")
        else:
            faults.append(f"{name} is not in {place}")
    # What the loader reads, beside the symbol table.
    own = names(binary.symbols) - set(origins)
    for binding in binary.bindings:
        assert binding.symbol is not None
        name, library_bound = str(binding.symbol.name), binding.library
        place = PYTHON if library_bound is None else str(library_bound.name)
        # A weak definition of its own, for which another library's may stand in.
        replaceable = library_bound is None and binding.library_ordinal == 0
        if name not in own if replaceable else origins.get(name) != place:
            faults.append(f"{name} of {origins.get(name)} is bound to {place}")
    if faults:
        raise CrossCompileError("\n".join([f"{library.name}:", *faults]))
    return dict(counts.most_common())


def check_exceptions(binary: lief.MachO.Binary) -> list[str]:
    """The types of the C++ library that are another's than those that MLX throws.

    A class with all of its virtual functions in headers, as bad_function_call was
    until LLVM 19, has a type in each library that uses it. On arm64 macOS the pointer
    to such a type's name has its highest bit set: they are compared by name.
    """
    faults = []
    for symbol in binary.symbols:
        name = str(symbol.name)
        found = re.fullmatch(r"__ZTI(?:St|NSt3__1)(\d+)(\w+?)E?", name)
        if symbol.type != lief.MachO.Symbol.TYPE.SECTION or not found:
            continue
        if len(found[2]) == int(found[1]):  # else a template
            content = binary.get_content_from_virtual_address(symbol.value + 8, 8)
            if not int.from_bytes(content, "little") >> 63:
                faults.append(f"std::{found[2]} is a type of its own")
    return faults


def check_signature(library: Path, binary: lief.MachO.Binary) -> list[str]:
    """What the Mac's kernel would find wrong with the signature.

    The format is that of the kernel's cs_blobs.h: a table of blobs, of which the
    first, the code directory, has a hash of each page of the file up to itself.
    """
    if not binary.has_code_signature:
        return ["is not signed"]
    content = library.read_bytes()
    assert binary.code_signature is not None
    end = binary.code_signature.data_offset
    magic, _, _, kind, offset = struct.unpack_from(">5I", content, end)
    directory = content[end + offset :]
    fields = struct.unpack_from(">9I4B", directory)
    _, _, _, flags, hashes, _, _, pages, limit, size, algorithm, _, log_page = fields
    page = 1 << log_page
    adhoc, sha256 = 2, 2
    if (
        (magic, kind, fields[0]) != (0xFADE0CC0, 0, 0xFADE0C02)
        or (flags & adhoc, size, algorithm, limit) != (adhoc, 32, sha256, end)
        or pages != -(-end // page)
    ):
        return ["has a signature of another kind"]
    return [
        f"has another page {i} than was signed"
        for i in range(pages)
        if hashlib.sha256(content[i * page : min((i + 1) * page, end)]).digest()
        != directory[hashes + i * size :][:size]
    ]


def known_exports(mlx: Path, nanobind: Path) -> dict[str, set[str]]:
    """By library, the symbols that it has on macOS 14."""
    exports = {CXX: set(LIBCXX), OBJC: set()}
    for folder in {mlx, macos_wheels(mlx_versions.NEWEST) / "mlx"}:
        for path in [*folder.glob("lib/*.dylib"), *folder.glob("core.*.so")]:
            binary = parse(path)
            if minimum_macos(binary) > MACOS:
                raise CrossCompileError(f"{path.name} is for a later macOS than 14.0")
            libraries = linked(binary)
            for symbol in undefined(binary):
                if not symbol.description & WEAK_REFERENCE:
                    found = exports.setdefault(origin(symbol, libraries), set())
                    found.add(str(symbol.name))
    libmlx = parse(mlx / "lib/libmlx.dylib")  # named: lief's lists do not keep it alive
    exports[MLX] = names(libmlx.exported_symbols)

    # Of arm64e too: Apple lists only some of its libraries for arm64.
    listed = package_folder("ziglang") / "lib/libc/darwin/libSystem.tbd"
    exports[SYSTEM] = {
        name.strip(" \n'")
        for targets, names in re.findall(
            r"targets:\s*\[([^]]*)]\s*symbols:\s*\[([^]]*)]", listed.read_text()
        )
        if re.search(r"\barm64e?-macos\b", targets)
        for name in names.split(",")
    }

    listed = nanobind / "cmake/darwin-ld-cpython.sym"
    exports[PYTHON] = {
        name
        for name in re.findall(r"-U (\w+)", listed.read_text())
        if hasattr(ctypes.pythonapi, name[1:])
    }
    return exports


def write_stub(folder: Path, library: str, symbols: set[str]) -> Path:
    """A library of macOS as the linker wants to see it: its name and symbols."""
    path = folder / f"{Path(library).stem}.tbd"
    quoted = ", ".join(f"'{name}'" for name in sorted(symbols))
    text = f"""--- !tapi-tbd
tbd-version: 4
targets: [ arm64-macos ]
install-name: '{library}'
exports:
  - targets: [ arm64-macos ]
    symbols: [ {quoted} ]
...
"""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def parse(path: Path) -> lief.MachO.Binary:
    binaries = lief.MachO.parse(str(path))
    binary = binaries.at(0) if binaries else None
    if binary is None:
        raise CrossCompileError(f"{path.name} is not Mach-O")
    return binary


def linked(binary: lief.MachO.Binary) -> list[str]:
    """The libraries that it loads, in the order of their ordinals."""
    own_name = lief.MachO.LoadCommand.TYPE.ID_DYLIB
    return [str(x.name) for x in binary.libraries if x.command != own_name]


def minimum_macos(binary: lief.MachO.Binary) -> list[int]:
    version = binary.build_version
    if version is None:
        raise CrossCompileError("a library does not say for which macOS it is")
    return list(version.minos)


def names(symbols: Iterable[lief.MachO.Symbol]) -> set[str]:
    return {str(symbol.name) for symbol in symbols}


def undefined(binary: lief.MachO.Binary) -> list[lief.MachO.Symbol]:
    kind = lief.MachO.Symbol.TYPE.UNDEFINED
    return [symbol for symbol in binary.symbols if symbol.type == kind]


def origin(symbol: lief.MachO.Symbol, libraries: list[str]) -> str:
    """The library in which the linker found it; Python, if in none."""
    ordinal = symbol.description >> 8
    return libraries[ordinal - 1] if 1 <= ordinal <= len(libraries) else PYTHON


def package_folder(name: str) -> Path:
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        raise CrossCompileError(f"{name} is not installed")
    return Path(package.origin).parent


def run(*command: str, **environment: str) -> list[str]:
    """Prints its progress, and returns what else it says, or raises it if it fails."""
    progress = re.compile(r"\[\d+/\d+\] ")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "NINJA_STATUS": "[%f/%t] ", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        messages = []
        for line in process.stdout:
            if progress.match(line):
                print(line, end="", flush=True)
            else:
                messages.append(line)
    if process.returncode:
        raise CrossCompileError("".join(messages))
    return messages


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build the wheel for arm64 macOS and check its symbols."
    )
    parser.add_argument("--output", type=Path, default=Path("build/cross"))
    parser.add_argument("--wheels", type=Path, help="the folder for the wheel")
    parser.add_argument("--mlx", help="only for this version, without merging")
    parser.add_argument(
        "--extra-source", type=Path, help="a C++ file to build in, for trials"
    )
    options = parser.parse_args()
    try:
        if options.mlx or options.extra_source:
            version = options.mlx or mlx_versions.NEWEST
            print(cross_compile(options.output, version, options.extra_source))
        else:
            cross_compile_every(options.output, options.wheels)
    except (BuildError, CrossCompileError) as error:
        print(f"cross-compile failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
