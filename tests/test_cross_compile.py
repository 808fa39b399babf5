"""The whole extension builds for arm64 macOS 14, and finds all it needs there."""

import re
import subprocess
import sys
from pathlib import Path

import lief
import mlx_versions
import pytest
from cross_compile.cross_compile import (
    CXX,
    MLX,
    OBJC,
    SYSTEM,
    CrossCompileError,
    check_signature,
    cross_compile,
    linked,
    minimum_macos,
    origin,
    parse,
    undefined,
)

pytestmark = pytest.mark.fused
ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build/cross"
PROGRAM = ROOT / "tests/cross_compile/cross_compile.py"
# `make wheel-macos` does so for every MLX.
NAME = f"_ext_{mlx_versions.NEWEST.replace('.', '_')}"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), "--output", str(OUTPUT), *arguments],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def library() -> Path:
    done = run("--mlx", mlx_versions.NEWEST)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"cross-compile for MLX [\d.]+: \d+ files compiled, 1 library linked, "
        r"\d+ symbols resolved \(.*libmlx \d+.*\)",
        summary,
    )
    (path,) = (OUTPUT / mlx_versions.NEWEST).glob(f"{NAME}.cpython-*-darwin.so")
    return path


def test_it_is_an_extension_for_arm64_macos_14(library: Path) -> None:
    binary = parse(library)
    assert binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
    assert minimum_macos(binary) == [14, 0, 0]
    own_name, *libraries = (str(x.name) for x in binary.libraries)
    assert own_name == library.name
    assert sorted(libraries) == sorted([MLX, CXX, SYSTEM, OBJC])
    assert [x.path for x in binary.rpaths] == ["@loader_path/../mlx/lib"]
    assert f"_PyInit_{NAME}" in {symbol.name for symbol in binary.exported_symbols}


def test_it_catches_what_mlx_throws(library: Path) -> None:
    binary = parse(library)
    libraries = linked(binary)
    types = {
        str(x.name): origin(x, libraries)
        for x in undefined(binary)
        if str(x.name).startswith("__ZTISt")
    }
    for name in ("9exception", "13runtime_error", "16invalid_argument"):
        assert types[f"__ZTISt{name}"] == CXX


def test_a_signature_of_other_content_is_refused(library: Path, tmp_path: Path) -> None:
    """The Mac's kernel ends a program that loads such a library."""
    binary = parse(library)
    assert check_signature(library, binary) == []
    assert binary.code_signature is not None
    end = binary.code_signature.data_offset
    copy = tmp_path / library.name
    content = library.read_bytes()
    page = 16384
    for offset in (100, 2 * page, end - 1):  # the header, some code, the last byte
        changed = bytearray(content)
        changed[offset] ^= 1
        copy.write_bytes(changed)
        faults = check_signature(copy, binary)
        assert faults == [f"has another page {offset // page} than was signed"]
    changed = bytearray(content)
    changed[end] ^= 1
    copy.write_bytes(changed)
    assert check_signature(copy, binary) == ["has a signature of another kind"]
    binary.remove_signature()
    binary.write(str(copy))
    assert check_signature(copy, parse(copy)) == ["is not signed"]


def test_it_holds_the_kernels(library: Path) -> None:
    content = library.read_bytes()
    kernels = list(ROOT.glob("metal/*.metal"))
    assert kernels
    for kernel in kernels:
        # Headers stand in place of the lines that include them.
        text = re.split(r'#include ".*"\n', kernel.read_text())[-1]
        assert "[[kernel]]" in text or "METAL_FUNC" in text
        assert text.encode() in content


def test_it_is_what_cmake_builds_on_a_mac(library: Path) -> None:
    sources = set(cross_compile(OUTPUT).sources)
    of_mlx_fused = {source for source in sources if source.startswith("csrc/")}
    all_sources = {str(x.relative_to(ROOT)) for x in ROOT.glob("csrc/**/*.cpp")}
    assert of_mlx_fused == all_sources - {"csrc/metal/unavailable.cpp"}
    assert any(source.endswith("nanobind/src/nb_internals.cpp") for source in sources)


def with_extra_source(folder: Path, text: str) -> str:
    """The message with which the extension is refused when `text` is part of it."""
    source = folder / "extra.cpp"
    source.write_text(text)
    with pytest.raises(CrossCompileError) as refused:
        cross_compile(OUTPUT, extra_source=source)
    return str(refused.value)


def test_an_unknown_symbol_is_named(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "extra.cpp"
    source.write_text(
        "void defined_nowhere();\n"
        '__attribute__((visibility("default"))) void extra() { defined_nowhere(); }\n'
    )
    done = run("--extra-source", str(source))
    assert done.returncode == 1
    assert re.search(r"defined_nowhere\w* is not in macOS 14, MLX or", done.stderr)
    assert done.stderr.count(" is not in ") == 1


def test_a_compile_error_is_shown(library: Path, tmp_path: Path) -> None:
    message = with_extra_source(tmp_path, "int extra() { return undeclared; }\n")
    assert "extra.cpp:1:22: error: use of undeclared identifier" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "#include <charconv>\n"
            "void extra(const char* text, double& x) {\n"
            "  std::from_chars(text, text, x);\n"
            "}\n",
            "extra.cpp:3:8: error: 'from_chars' is unavailable: introduced in macOS 26",
        ),
        (
            "#include <math.h>\n"
            "_Float16 extra(_Float16 x) {\n"
            "  return __sqrtf16(x);\n"
            "}\n",
            "extra.cpp:3:10: error: '__sqrtf16' is only available on macOS 15.0",
        ),
    ],
    ids=["libc++", "libSystem"],
)
def test_the_compiler_refuses_what_is_newer_than_macos_14(
    library: Path, tmp_path: Path, text: str, message: str
) -> None:
    assert message in with_extra_source(tmp_path, text)


def test_a_type_that_libcxx_would_not_know_is_refused(
    library: Path, tmp_path: Path
) -> None:
    # A class with a virtual function outside of headers has one type, which is
    # compared by its address: this one is not that of another library.
    message = with_extra_source(
        tmp_path,
        "#include <exception>\n"
        "namespace std {\n"
        "struct own_error : exception { ~own_error() override; };\n"
        "own_error::~own_error() {}\n"
        "}\n"
        '__attribute__((visibility("default"))) void extra() {\n'
        "  throw std::own_error();\n"
        "}\n",
    )
    assert message.endswith("std::own_error is a type of its own")


def test_a_symbol_that_libcxx_of_macos_14_lacks_is_refused(
    library: Path, tmp_path: Path
) -> None:
    # Of LLVM 21; the headers mark neither it nor those who call it.
    message = with_extra_source(
        tmp_path,
        "#include <cstddef>\n"
        "namespace std::inline __1 {\n"
        "size_t __hash_memory(const void*, size_t);\n"
        "}\n"
        '__attribute__((visibility("default"))) size_t extra(const char* text) {\n'
        "  return std::__hash_memory(text, 1);\n"
        "}\n",
    )
    assert "__ZNSt3__113__hash_memoryEPKvm is not in macOS 14" in message
