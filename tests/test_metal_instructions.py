"""Counts of a kernel's instructions and registers, as clang compiles it for a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ziglang", reason="kernels are compiled with ziglang's clang")

from metal_simulator import CompileError
from metal_simulator.extension import extension
from metal_simulator.instructions import KernelInstructions, count, table

pytestmark = pytest.mark.fused
TESTS = Path(__file__).parent
OUT = "device float* y [[buffer(0)]]"
IN_OUT = f"{OUT}, const device float* x [[buffer(1)]]"


def counted(body: str, parameters: str = IN_OUT) -> KernelInstructions:
    """The counts of a kernel of one line."""
    source = (
        "#include <metal_stdlib>\nusing namespace metal;\n"
        f"kernel void k({parameters}, uint i [[thread_position_in_grid]]) "
        f"{{\n{body}\n}}\n"
    )
    (kernel,) = count(source)
    assert kernel.kernel == "k"
    return kernel


def test_arithmetic_is_counted() -> None:
    copy = counted("y[i] = x[i];")
    assert 0 < copy.vector <= 12  # the position, two addresses
    assert copy.memory >= 2
    assert counted("y[i] = x[i] + 1.5f;").vector == copy.vector + 1
    assert counted("y[i] = fma(x[i], x[i], 1.5f);").vector == copy.vector + 1


def test_contraction_is_what_the_source_says() -> None:
    body = "y[i] = x[i] * x[i] + 1.5f;"
    contracted = counted(body)
    assert counted(f"#pragma METAL fp contract(off)\n{body}").vector == (
        contracted.vector + 1
    )


def test_division_of_64_bits_is_dear() -> None:
    # Why index arithmetic is done in 32 bits.
    parameters = f"{IN_OUT}, constant {{}}& n [[buffer(2)]]"
    narrow = counted("y[i] = x[i / n];", parameters.format("uint"))
    wide = counted("y[i] = x[long(i) / n];", parameters.format("long"))
    assert wide.vector > 2 * narrow.vector


BODIES = {
    "arithmetic": "y[i] = 2 * x[i] + 1;",
    "threadgroup memory": (
        "threadgroup float s[64]; s[i % 64] = x[i]; "
        "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[63 - i % 64];"
    ),
    "simd operations": "y[i] = simd_sum(x[i]) + simd_shuffle_xor(x[i], ushort(1));",
    "prefix": "y[i] = simd_prefix_inclusive_sum(x[i]);",
    "functions": "y[i] = pow(x[i], 2.7f) + precise::sqrt(x[i]) + exp(x[i]) / x[i];",
    "a small array": "float v[4]; for (int j = 0; j < 4; ++j) v[j] = x[4 * i + j]; "
    "y[i] = v[0] + v[1] * v[2] + v[3];",
    "half and bfloat": "y[i] = float(half(x[i])) + float(bfloat(x[i]));",
    "atomics": "atomic_fetch_add_explicit((device atomic_uint*)y, i, "
    "memory_order_relaxed);",
}


@pytest.mark.parametrize("name", BODIES)
def test_kernels_whose_variables_fit_have_no_spills(name: str) -> None:
    kernel = counted(BODIES[name])
    assert (kernel.spills, kernel.scratch) == (0, 0)
    assert 0 < kernel.registers < 64
    assert kernel.vector > 0


def test_array_that_is_indexed_at_run_time_is_in_scratch() -> None:
    fill = "float v[256]; for (int j = 0; j < 256; ++j) v[j] = x[j]; "
    kernel = counted(fill + "y[i] = v[int(x[i]) & 255];")
    assert kernel.scratch >= 4 * 256
    assert kernel.spills == 0
    assert counted(fill.replace("256", "16") + "y[i] = v[7];").scratch == 0


def test_values_that_do_not_fit_are_spilled() -> None:
    # 320 values that live across a barrier; a thread has 256 registers.
    loads = "".join(f"float a{j} = x[i * 320 + {j}]; " for j in range(320))
    uses = " + ".join(f"a{j} * x[{j}]" for j in reversed(range(320)))
    barrier = "threadgroup_barrier(mem_flags::mem_device); "
    kernel = counted(f"{loads}{barrier}y[i] = {uses};")
    assert kernel.spills > 0
    assert kernel.scratch > 0


def test_every_instantiation_is_counted_by_its_name() -> None:
    source = """#include <metal_stdlib>
template <typename T>
[[kernel]] void square(device T* y [[buffer(0)]],
                       uint i [[thread_position_in_grid]]) { y[i] = y[i] * y[i]; }
template [[host_name("square_half")]] [[kernel]] decltype(square<half>) square<half>;
template [[host_name("square_bfloat")]] [[kernel]]
decltype(square<bfloat>) square<bfloat>;
"""
    half, bfloat = count(source)
    assert (half.kernel, bfloat.kernel) == ("square_half", "square_bfloat")
    assert bfloat.vector > half.vector  # this GPU has no bfloat16: it rounds by hand


def test_compiler_refuses_with_its_message() -> None:
    with pytest.raises(CompileError, match=r"kernel\.metal:4:\d+: error: .*unknown"):
        counted("y[i] = unknown;")


def test_table_and_command_line(tmp_path: Path) -> None:
    source = tmp_path / "own.metal"
    (tmp_path / "twice.h").write_text("inline float twice(float x) { return 2 * x; }\n")
    source.write_text(
        '#include <metal_stdlib>\n#include "twice.h"\n'
        "kernel void k(device float* y, uint i [[thread_position_in_grid]]) "
        "{ y[i] = twice(y[i]); }\n"
    )
    command = [sys.executable, "-m", "metal_simulator.instructions", str(source)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.stderr == ""
    head = "| kernel | vector | scalar | memory | registers | scratch | spills |\n"
    assert done.stdout.startswith(head)
    assert done.stdout == table(count(source.read_text(), "own", (str(tmp_path),)))
    source.write_text("kernel void k(device float* y) { z = 1; }\n")
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 1
    assert "own.metal:1:" in done.stderr


@pytest.mark.skipif(extension() is None, reason="the simulator is not built")
def test_no_kernel_of_ours_spills(tmp_path: Path) -> None:
    """Of the most used rule, held in each way, those of most states, and Adafactor."""
    rules = ["--rules", "AdamBiasCorrected", "AdafactorMatrix", "Adan", "fuse"]
    command = [sys.executable, "-m", "bench.metal_instructions", *rules]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    names = [row[0] for row in rows]
    assert any("24bitbfloat_int8" in name and "staged" in name for name in names)
    assert any("factored_write" in name for name in names)
    assert any("Program" in name and "int8" in name for name in names)
    # Scratch memory and spills.
    assert {tuple(row[-2:]) for row in rows} == {("0", "0 |")}
