"""The Metal simulator sees each fault, and passes what Metal would pass.

Its judgement rests on three things: every fault that it claims to report is
provoked here next to the kernel without it; kernels that MLX ships give MLX's
results; and counters are exact on kernels whose traffic is known.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("ziglang", reason="the simulator compiles with ziglang's clang")

import metal_simulator as simulator
from metal_simulator import CompileError, MetalError, Out

pytestmark = [
    pytest.mark.fused,
    # Not where the environment names a library: that one must be there.
    pytest.mark.skipif(
        "MLX_FUSED_SIMULATOR_LIBRARY" not in os.environ
        and not simulator.library_path().exists(),
        reason="the simulator is not built",
    ),
]

SEEDS = (0, 1, 2)


def floats(n: int) -> np.ndarray[Any, Any]:
    return np.arange(1, n + 1, dtype=np.float32)


def kernel(parameters: str, body: str) -> str:
    """A kernel whose body stands in line 4."""
    return (
        "#include <metal_stdlib>\nusing namespace metal;\n"
        f"kernel void k({parameters}, uint i [[thread_position_in_grid]]) "
        f"{{\n{body}\n}}\n"
    )


@dataclass
class Fault:
    parameters: str
    faulty: str
    correct: str
    message: str
    buffers: tuple[int, ...] = (64,)  # floats in each array; 0 is the output
    threads: int = 64
    group: int = 64
    extra: tuple[Any, ...] = field(default=())

    def run(self, body: str, seed: int = 0) -> None:
        out, *others = (floats(n) for n in self.buffers)
        buffers = [Out(out), *others, *self.extra]
        simulator.run(
            kernel(self.parameters, body),
            "k",
            buffers,
            grid=self.threads,
            group=self.group,
            seed=seed,
        )


OUT = "device float* y [[buffer(0)]]"
IN_OUT = f"{OUT}, const device float* x [[buffer(1)]]"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

FAULTS = {
    "write beyond the end": Fault(
        OUT,
        "y[i + 1] = 1;",
        "y[i] = 1;",
        r"kernel k: write of 4 bytes that ends 4 bytes after the end of buffer 0 "
        r"\(256 bytes\); thread \(63, 0, 0\) at kernel.metal:4",
    ),
    "read beyond the end": Fault(
        IN_OUT,
        "y[i] = x[2 * i];",
        "y[i] = x[i];",
        r"kernel k: read of 4 bytes that ends 4 bytes after the end of buffer 1 "
        r"\(256 bytes\); thread \(32, 0, 0\) at kernel.metal:4",
        buffers=(64, 64),
    ),
    "read before the start": Fault(
        IN_OUT,
        "y[i] = x[int(i) - 2];",
        "y[i] = x[i];",
        r"read of 4 bytes 8 bytes before the start of buffer 1 \(256 bytes\); "
        r"thread \(0, 0, 0\) at kernel.metal:4",
        buffers=(64, 64),
    ),
    "struct copied beyond the end": Fault(
        OUT,
        "struct S { float v[12]; }; device S* s = (device S*)y; S a = s[i]; s[i] = a;",
        "struct S { float v[8]; }; device S* s = (device S*)y; S a = s[i]; s[i] = a;",
        r"read of 48 bytes that ends \d+ bytes after the end of buffer 0 \(256 bytes\)",
        threads=8,
        group=8,
    ),
    "index of a thread's own array": Fault(
        OUT,
        "float v[4]; for (uint j = 0; j <= i % 5; ++j) v[j] = j; y[i] = v[i % 4];",
        "float v[4]; for (uint j = 0; j < 4; ++j) v[j] = j; y[i] = v[i % 4];",
        r"index 4 is out of bounds of an array .*float.*; thread \(4, 0, 0\) at "
        r"kernel.metal:4",
    ),
    "index of a threadgroup array": Fault(
        OUT,
        "threadgroup float s[32]; s[i] = i; y[i] = s[i];",
        "threadgroup float s[64]; s[i] = i; y[i] = s[i];",
        r"index 32 is out of bounds of an array .*; thread \(32, 0, 0\) at "
        r"kernel.metal:4",
    ),
    "two threads write one address": Fault(
        OUT,
        "y[i / 2] = 1;",
        "if (i % 2 == 0) y[i / 2] = 1;",
        r"buffer 0 is written at byte 0, which thread \(0, 0, 0\) has written in the "
        r"same "
        r"launch; thread \(1, 0, 0\) at kernel.metal:4",
    ),
    "a thread reads what another wrote": Fault(
        OUT,
        "y[i] = y[i == 0 ? 0 : i - 1];",
        "y[i] = y[i];",
        r"buffer 0 is read at byte 0, which thread \(0, 0, 0\) has written in the same "
        r"launch; thread \(1, 0, 0\) at kernel.metal:4",
    ),
    "a thread writes what another has read": Fault(
        OUT,
        "y[i] = y[(i + 1) % 64];",
        "float v = y[(i + 1) % 64]; threadgroup_barrier(mem_flags::mem_device); y[i] "
        "= v;",
        r"buffer 0 is written at byte 4, which thread \(0, 0, 0\) has read in the same "
        r"launch; thread \(1, 0, 0\) at kernel.metal:4",
    ),
    "a thread writes what several have read": Fault(
        OUT,
        "float v = y[0]; if (i == 63) y[0] = v;",
        "float v = y[1]; if (i == 63) y[0] = v;",
        r"buffer 0 is written at byte 0, which another thread has read in the same "
        r"launch; "
        r"thread \(63, 0, 0\) at kernel.metal:4",
    ),
    "a barrier of the wrong memory": Fault(
        OUT,
        f"float v = y[63 - i]; {BARRIER} y[i] = v;",
        "float v = y[63 - i]; threadgroup_barrier(mem_flags::mem_device); y[i] = v;",
        r"buffer 0 is written at byte 0, which thread \(63, 0, 0\) has read in the "
        r"same launch",
    ),
    "a barrier does not reach other threadgroups": Fault(
        OUT,
        "y[i] = 1; threadgroup_barrier(mem_flags::mem_device); y[(i + 32) % 64] += 1;",
        "y[i] = 1; threadgroup_barrier(mem_flags::mem_device); y[i ^ 1] += 1;",
        r"buffer 0 is written at byte 128, which thread \(0, 0, 0\) has written in "
        r"the same "
        r"launch; thread \(32, 0, 0\)",
        group=32,
    ),
    "no barrier between write and read": Fault(
        OUT,
        "threadgroup float s[64]; s[i] = i; y[i] = s[63 - i];",
        f"threadgroup float s[64]; s[i] = i; {BARRIER} y[i] = s[63 - i];",
        r"threadgroup memory is (read|written) at byte \d+, which thread \(\d+, 0, "
        r"0\) has "
        r"(read|written) with no barrier between; thread \(\d+, 0, 0\) at "
        r"kernel.metal:4",
    ),
    "a simdgroup's barrier for the threadgroup": Fault(
        OUT,
        "threadgroup float s[64]; s[i] = i; "
        "simdgroup_barrier(mem_flags::mem_threadgroup); "
        "y[i] = s[63 - i];",
        "threadgroup float s[64]; s[i] = i; "
        "simdgroup_barrier(mem_flags::mem_threadgroup); "
        "y[i] = s[i ^ 31];",
        r"threadgroup memory is (read|written) at byte \d+, .* with no barrier between",
    ),
    "barrier not reached by all": Fault(
        OUT,
        f"if (i < 63) {{ {BARRIER} }} y[i] = 1;",
        f"{BARRIER} y[i] = 1;",
        r"threadgroup_barrier at kernel.metal:4 is reached by 63 of 64 threads of the "
        r"threadgroup: thread \(0, 0, 0\) waits there, thread \(63, 0, 0\) has "
        r"returned",
    ),
    "two barriers": Fault(
        OUT,
        f"if (i < 63) {{\n{BARRIER} y[i] = 2; }} else {{\n{BARRIER} y[i] = 1; }}",
        f"{BARRIER} y[i] = i < 63 ? 2 : 1;",
        r"threadgroup_barrier reached while thread \(0, 0, 0\) waits at another one, "
        r"at "
        r"kernel.metal:5; thread \(63, 0, 0\) at kernel.metal:6",
    ),
    "simd operation not reached by all": Fault(
        OUT,
        "if (i != 40) y[i] = simd_sum(y[i]);",
        "y[i] = simd_sum(y[i]);",
        r"simd operation at kernel.metal:4 is reached by 31 of 32 threads of the "
        r"simdgroup: "
        r"thread \(32, 0, 0\) waits there, thread \(40, 0, 0\) has returned",
    ),
    "simd operation against barrier": Fault(
        OUT,
        f"if (i == 0) {{ {BARRIER} }} else {{ y[i] = simd_max(y[i]); }}",
        f"{BARRIER} y[i] = simd_max(y[i]);",
        r"is reached by 1 of 64 threads .* waits for a simd operation at "
        r"kernel.metal:4",
    ),
    "a lane that is not there": Fault(
        OUT,
        "y[i] = simd_shuffle(y[i], ushort(40 - i));",
        "y[i] = simd_shuffle(y[i], ushort(i % 8));",
        r"a simd operation reads lane 40, which the simdgroup does not have; thread "
        r"\(0, 0, 0\)",
        buffers=(40,),
        threads=40,
        group=40,
    ),
    "input written": Fault(
        "device float* y [[buffer(0)]], device float* x [[buffer(1)]]",
        "x[i] = y[i];",
        "y[i] = x[i];",
        r"buffer 1 was announced as an input only and is written at byte 0; "
        r"thread \(0, 0, 0\) at kernel.metal:4",
        buffers=(64, 64),
    ),
    "memory that was never announced": Fault(
        f"{OUT}, constant ulong& address [[buffer(1)]]",
        "y[i] = *reinterpret_cast<device float*>(address);",
        "y[i] = address;",
        r"read of 4 bytes at an address in no buffer that was announced to the "
        r"encoder; "
        r"thread \(0, 0, 0\) at kernel.metal:4",
        extra=(np.uint64(0x123456789000),),
    ),
    "misaligned vector": Fault(
        IN_OUT,
        "*(device float4*)(y + 4 * i) = *(const device float4*)(x + 4 * i + 1);",
        "*(device float4*)(y + 4 * i) = *(const device float4*)(x + 4 * i);",
        r"byte 4 of buffer 1, byte 4 of its memory, which is not a multiple of 16; "
        r"thread \(0, 0, 0\) at kernel.metal:4",
        buffers=(256, 257),
    ),
    "misaligned struct": Fault(
        IN_OUT,
        "struct alignas(16) V { float v[4]; }; V a = *(const device V*)(x + 2 * i); "
        "*(device V*)(y + 4 * i) = a;",
        "struct alignas(8) V { float v[4]; }; V a = *(const device V*)(x + 2 * i); "
        "*(device V*)(y + 4 * i) = a;",
        r"access to a struct at byte 8 of buffer 1, byte 8 of its memory, which is "
        r"not a "
        r"multiple of 16; thread \(1, 0, 0\) at kernel.metal:4",
        buffers=(256, 257),
    ),
    "too much threadgroup memory": Fault(
        OUT,
        "threadgroup float s[8193]; s[i] = i; y[i] = s[i];",
        "threadgroup float s[8192]; s[i] = i; y[i] = s[i];",
        r"32772 bytes of threadgroup memory; Metal has 32768; thread \(0, 0, 0\)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported_and_its_correction_passes(name: str) -> None:
    fault = FAULTS[name]
    with pytest.raises(MetalError, match=fault.message):
        fault.run(fault.faulty)
    for seed in SEEDS:
        fault.run(fault.correct, seed)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported_in_any_order_of_threads(name: str) -> None:
    fault = FAULTS[name]
    for seed in range(1, 6):
        with pytest.raises(MetalError, match="kernel k: "):
            fault.run(fault.faulty, seed)


def test_overrun_into_a_neighbouring_array_is_reported() -> None:
    memory = floats(128)
    source = kernel(OUT + ", device float* z [[buffer(1)]]", "y[i + 1] = z[i];")
    with pytest.raises(MetalError, match="4 bytes after the end of buffer 0"):
        simulator.run(source, "k", [Out(memory[:64]), memory[64:]], grid=64, group=64)


def test_views_are_judged_by_their_offset() -> None:
    source = kernel("device float4* y [[buffer(0)]]", "y[i] += 1;")
    memory = floats(72)
    simulator.run(source, "k", [Out(memory[4:68])], grid=16, group=16)
    assert memory.tolist() == [*range(1, 5), *range(6, 70), *range(69, 73)]
    with pytest.raises(MetalError, match="byte 0 of buffer 0, byte 8 of its memory"):
        simulator.run(source, "k", [Out(memory[2:66])], grid=16, group=16)


def test_arrays_that_share_memory_are_one_memory() -> None:
    memory = floats(64)
    source = kernel(IN_OUT, "y[i] = 2 * x[i];")
    launch = simulator.run(source, "k", [Out(memory), memory], grid=64, group=64)
    assert memory.tolist() == (2 * floats(64)).tolist()
    assert launch.unique_bytes_written == 256
    racing = kernel(IN_OUT, "y[i] = x[63 - i];")
    with pytest.raises(MetalError, match=r"buffer 0/1 is (read|written) at byte"):
        simulator.run(racing, "k", [Out(memory), memory], grid=64, group=64)


def test_failed_launch_writes_nothing() -> None:
    y = floats(64)
    with pytest.raises(MetalError):
        simulator.run(kernel(OUT, "y[i + 1] = 9;"), "k", [Out(y)], grid=64, group=64)
    assert y.tolist() == floats(64).tolist()


ENCODER_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unbound": ({"buffers": [(0, Out(floats(64)))]}, "buffer 1 is not bound"),
    "doubly bound": (
        {"buffers": [(0, Out(floats(64))), (1, floats(64)), (1, floats(64))]},
        "buffer 1 is bound twice before a dispatch",
    ),
    "more than 31 buffers": (
        {"buffers": [(0, Out(floats(64))), (1, floats(64)), (31, floats(64))]},
        "buffer 31: Metal has the indices 0 to 30",
    ),
    "1025 threads": (
        {"group": 1025},
        "1025 threads in a threadgroup; Metal allows 1024",
    ),
    "empty grid": ({"grid": 0}, "a grid or threadgroup of size zero"),
    "empty threadgroup": ({"group": 0}, "a grid or threadgroup of size zero"),
    "set_bytes of 4097": (
        {"buffers": [Out(floats(64)), bytes(4097)]},
        "set_bytes of 4097 bytes at index 1; Metal allows 4096",
    ),
    "threadgroup memory": (
        {"threadgroup_memory": {0: 32769}},
        "32769 bytes of threadgroup memory; Metal has 32768",
    ),
}


@pytest.mark.parametrize("name", ENCODER_FAULTS)
def test_encoder_refuses(name: str) -> None:
    arguments: dict[str, Any] = {
        "buffers": [Out(floats(64)), bytes(4096)],
        "grid": 64,
        "group": 64,
        "threadgroup_memory": {0: 32768},
    }
    source = kernel(IN_OUT, "y[i] = x[i];")
    simulator.run(source, "k", **arguments)
    faulty, message = ENCODER_FAULTS[name]
    with pytest.raises(MetalError, match=f"kernel k: {message}"):
        simulator.run(source, "k", **{**arguments, **faulty})


def test_threadgroup_argument_must_be_bound() -> None:
    source = kernel(
        OUT + ", threadgroup float* s [[threadgroup(0)]]",
        f"s[i] = y[i]; {BARRIER} y[i] = s[63 - i];",
    )
    y = floats(64)
    simulator.run(source, "k", [Out(y)], grid=64, group=64, threadgroup_memory={0: 256})
    assert y.tolist() == floats(64)[::-1].tolist()
    with pytest.raises(MetalError, match="threadgroup memory 0 is not bound"):
        simulator.run(source, "k", [Out(y)], grid=64, group=64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("double d = y[i]; y[i] = d;", r"use of type 'double'"),
        (
            "threadgroup float* t = y; y[i] = t[0];",
            r"changes address space|cannot initialize",
        ),
        (
            "thread float* t = y + i; y[i] = *t;",
            r"changes address space|cannot initialize",
        ),
        ("y[i] = simd_sum(long(i));", r"no matching function for call to 'simd_sum'"),
        ("y[i] = unknown;", r"use of undeclared identifier 'unknown'"),
    ],
)
def test_compiler_refuses_with_its_message(body: str, message: str) -> None:
    with pytest.raises(CompileError, match=rf"name\.metal:4:\d+: error: .*({message})"):
        simulator.compile_kernels(kernel(OUT, body), "name")


# Constructs that MSL before 4.0 has not, and how one says that in C++14.
NEWER: dict[str, tuple[str, str, str]] = {
    "structured binding": (
        "struct P { float a, b; }; P p = {1, 2}; auto [a, b] = p; y[i] = a + b;",
        "struct P { float a, b; }; P p = {1, 2}; y[i] = p.a + p.b;",
        "structured binding declarations are incompatible",
    ),
    "initialization in if": (
        "if (float v = y[i]; v > 1) y[i] = v - 1;",
        "float v = y[i]; if (v > 1) y[i] = v - 1;",
        "if initialization statements are incompatible",
    ),
    "designated initializer": (
        "struct P { float a, b; }; P p = {.a = 1, .b = 2}; y[i] = p.a + p.b;",
        "struct P { float a, b; }; P p = {1, 2}; y[i] = p.a + p.b;",
        "designated initializers are a C[+][+]20 extension",
    ),
    "constexpr if": ("", "if constexpr (sizeof(float) == 4) y[i] = 1;", ""),
    "static_assert without message": ("", "static_assert(true); y[i] = 1;", ""),
}


@pytest.mark.parametrize("name", NEWER)
def test_what_is_newer_than_cpp14_is_refused(name: str) -> None:
    newer, older, message = NEWER[name]
    simulator.compile_kernels(kernel(OUT, older), "name")
    if newer:
        message = rf"name\.metal:4:\d+: error: {message}.*; MSL before 4.0 is C\+\+14"
        with pytest.raises(CompileError, match=message):
            simulator.compile_kernels(kernel(OUT, newer), "name")


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        ("inline constant float k1 = 1;", "constant float k1 = 1;"),
        ("namespace a::b { struct C; }", "namespace a { namespace b { struct C; } }"),
        ("template <auto n> struct D;", "template <int n> struct D;"),
        (
            "template <typename... T> float sum(T... t) { return (t + ...); }",
            "template <typename A, typename B> float sum(A a, B b) { return a + b; }",
        ),
    ],
    ids=["inline variable", "nested namespace", "template <auto>", "fold expression"],
)
def test_declarations_newer_than_cpp14_are_refused(newer: str, older: str) -> None:
    simulator.compile_kernels(f"{older}\n{kernel(OUT, 'y[i] = 1;')}", "name")
    with pytest.raises(CompileError, match=r"name\.metal:1:\d+: error: .*C\+\+14"):
        simulator.compile_kernels(f"{newer}\n{kernel(OUT, 'y[i] = 1;')}", "name")


@pytest.mark.parametrize("parameter", ["float* p", "float& p"])
def test_pointer_without_address_space_is_a_threads(parameter: str) -> None:
    source = (
        f"inline void set({parameter}) {{ {'*' if '*' in parameter else ''}p = 1; }}\n"
        "kernel void k(device float* y) {\n  float v;\n  set(%s);\n  y[0] = v;\n}\n"
    )
    own, memory = ("&v", "y") if "*" in parameter else ("v", "y[0]")
    y = floats(4)
    simulator.run(source % own, "k", [Out(y)], grid=1, group=1)
    assert y[0] == 1
    with pytest.raises(CompileError, match=r"name\.metal:4: error: a pointer"):
        simulator.compile_kernels(source % memory, "name")


def test_unsuffixed_literals_are_float() -> None:
    # In double the sum would keep the 1 that float has no room for.
    body = (
        "y[i] = (y[i] + 16777216.0 + 1.0) - 16777216.0; if (sizeof(1.0) != 4) y[i] = 9;"
    )
    y = np.zeros(1, np.float32)
    simulator.run(kernel(OUT, body), "k", [Out(y)], grid=1, group=1)
    assert y[0] == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_round_as_mlx_does(dtype: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    near_half = rng.normal(size=1 << 14).astype(np.float32) * np.float32(
        2.0
    ) ** rng.integers(-26, 17, 1 << 14).astype(np.float32)
    edges = np.array(
        [65504, 65519.996, 65520, 2**-24, 2**-25, 3 * 2**-26, -0.0], np.float32
    )
    x = np.concatenate([bits.view(np.float32), near_half, edges])
    x = x[~np.isnan(x)]
    msl = {"float16": "half", "bfloat16": "bfloat"}[dtype]
    y, back = np.zeros(x.size, np.uint16), np.zeros(x.size, np.float32)
    source = kernel(
        f"device {msl}* y [[buffer(0)]], device float* back [[buffer(1)]], "
        "const device float* x [[buffer(2)]]",
        f"y[i] = {msl}(x[i]); back[i] = float(y[i]);",
    )
    simulator.run(source, "k", [Out(y), Out(back), x], grid=x.size, group=256)
    expected = mx.array(x).astype(getattr(mx, dtype))
    assert np.array_equal(y, np.array(expected.view(mx.uint16)))
    assert np.array_equal(back, np.array(expected.astype(mx.float32)))


def test_counters_are_exact() -> None:
    source = kernel(
        IN_OUT + ", constant float& a [[buffer(2)]]",
        "y[i] += a * x[i / 2] + x[i / 2 + 1];",
    )
    simulator.reset()
    simulator.run(
        source, "k", [Out(floats(64)), floats(64), np.float32(2)], grid=64, group=32
    )
    assert simulator.counters() == [
        simulator.Launch(
            kernel="k",
            bytes_read=64 * 3 * 4,
            bytes_written=64 * 4,
            unique_bytes_read=(64 + 33) * 4,
            unique_bytes_written=64 * 4,
            constant_bytes_read=64 * 4,
            accesses=64 * 5,
            # x[i / 2] and x[i / 2 + 1] of a simdgroup lie in one line or in two.
            line_bytes_read=128 * (2 + 2 + 2 + 1),
            line_bytes_written=128 * 2,
            barriers=0,
        )
    ]
    simulator.reset()
    assert simulator.counters() == []


# What is written to y is read from x, with a factor of 128-byte lines to bytes.
LINES: dict[str, tuple[str, str, int, int]] = {
    "neighbours": ("float", "y[i] = x[i];", 1, 1),
    "every second element": ("float", "y[i] = x[2 * i % 2048];", 2, 1),
    "transposed": ("float", "y[i] = x[i % 32 * 64 + i / 32];", 32, 1),
    "transposed, written": ("float", "y[i % 32 * 64 + i / 32] = x[i];", 1, 32),
    "vectors": ("float4", "y[i] = x[i];", 1, 1),
    "half": ("half", "y[i] = x[i];", 2, 2),
    "vectors of half": ("half4", "y[i] = x[i];", 1, 1),
    "one thread, four neighbours": (
        "float",
        "if (i < 512) for (uint j = 4 * i; j < 4 * i + 4; ++j) y[j] = x[j];",
        4,
        4,
    ),
    "structs copied": (
        "float4",
        "struct S { float v[4]; }; ((device S*)y)[i] = ((const device S*)x)[i];",
        1,
        1,
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LINES)
def test_cache_lines_are_counted_per_instruction_of_a_simdgroup(
    name: str, seed: int
) -> None:
    msl, body, read, written = LINES[name]
    dtype = np.float16 if msl.startswith("half") else np.float32
    x = np.zeros((2048, 4 if msl.endswith("4") else 1), dtype)
    y = np.zeros_like(x)
    source = kernel(
        f"device {msl}* y [[buffer(0)]], const device {msl}* x [[buffer(1)]]", body
    )
    launch = simulator.run(source, "k", [Out(y), x], grid=2048, group=256, seed=seed)
    assert (launch.bytes_read, launch.bytes_written) == (x.nbytes, y.nbytes)
    lines = (launch.line_bytes_read, launch.line_bytes_written)
    assert lines == (read * x.nbytes, written * y.nbytes)


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_return_early_touch_no_line(seed: int) -> None:
    # Of each simdgroup, 20 threads go on; a line of the grid's second half is not
    # touched at all.
    body = "if (i % 32 >= 20 || i >= 128) return;\ny[i] = 2 * y[i];"
    launch = simulator.run(
        kernel(OUT, body), "k", [Out(floats(256))], grid=256, group=64, seed=seed
    )
    assert launch.bytes_read == 4 * 20 * 4
    assert (launch.line_bytes_read, launch.line_bytes_written) == (4 * 128, 4 * 128)


def test_lines_are_those_of_the_arrays_own_memory() -> None:
    # From byte 4 on each simdgroup reads the end of one line and most of the next.
    memory, y = floats(65), floats(64)
    source = kernel(IN_OUT, "y[i] = x[i];")
    launch = simulator.run(source, "k", [Out(y), memory[1:]], grid=64, group=64)
    assert (launch.line_bytes_read, launch.line_bytes_written) == (4 * 128, 2 * 128)


def test_rounds_of_a_loop_are_instructions_of_their_own() -> None:
    # All rounds read the same two lines, and each counts them.
    body = "float s = 0; for (uint j = 0; j < 5; ++j) s += y[(i + j) % 64]; x[i] = s;"
    source = kernel(
        "const device float* y [[buffer(0)]], device float* x [[buffer(1)]]", body
    )
    x, y = floats(64), floats(64)
    launch = simulator.run(source, "k", [x, Out(y)], grid=64, group=64)
    # Round 0 touches a line a simdgroup, the other four touch both lines.
    assert launch.line_bytes_read == 128 * 2 * (1 + 4 * 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_positions_and_uneven_threadgroups(seed: int) -> None:
    names = (
        "thread_position_in_grid",
        "threadgroup_position_in_grid",
        "thread_position_in_threadgroup",
        "threads_per_threadgroup",
        "threadgroups_per_grid",
        "threads_per_grid",
    )
    scalars = (
        "thread_index_in_threadgroup",
        "simdgroup_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "threads_per_simdgroup",
        "simdgroups_per_threadgroup",
    )
    parameters = [f"uint3 v{n} [[{name}]]" for n, name in enumerate(names)]
    parameters += [f"ushort s{n} [[{name}]]" for n, name in enumerate(scalars)]
    writes = "".join(f"for (int d = 0; d < 3; ++d) *at++ = v{n}[d];" for n in range(6))
    writes += "".join(f"*at++ = s{n};" for n in range(5))
    source = (
        f"kernel void k(device uint* out, {', '.join(parameters)}) {{"
        f"device uint* at = out + 23 * (v0.x + v5.x * (v0.y + v5.y * v0.z)); {writes} "
        f"}}"
    )
    grid, group = (10, 7, 3), (8, 5, 2)
    out = np.zeros((3, 7, 10, 23), np.uint32)
    simulator.run(source, "k", [Out(out)], grid=grid, group=group, seed=seed)
    for z, y, x in np.ndindex(3, 7, 10):
        p = np.array([x, y, z])
        g, local = p // group, p % group
        size = np.minimum(group, np.array(grid) - g * group)
        index = local[0] + size[0] * (local[1] + size[1] * local[2])
        simdgroups = -(-int(size.prod()) // 32)
        expected = [*p, *g, *local, *size, 2, 2, 2, *grid]
        expected += [index, index // 32, index % 32, 32, simdgroups]
        assert out[z, y, x].tolist() == expected


# ---- the arithmetic that a GPU may do ---------------------------------------


def both_ways(
    source: str, x: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What a kernel makes of x with the CPU's arithmetic, and with the unkind one."""
    kind, unkind = np.zeros_like(x), np.zeros_like(x)
    simulator.run(source, "k", [Out(kind), x], grid=x.size, group=x.size)
    with simulator.unkind():
        simulator.run(source, "k", [Out(unkind), x], grid=x.size, group=x.size)
    return kind, unkind


OFF = "#pragma METAL fp contract(off)\n"


@pytest.mark.parametrize(
    "body",
    [
        "y[i] = x[i] * x[i] - (1 + 0x1p-11f);",
        "float s = x[i] * x[i];\nfloat t = s - (1 + 0x1p-11f);\ny[i] = t;",
    ],
    ids=["one statement", "two statements"],
)
def test_unkind_contracts_unless_the_source_forbids_it(body: str) -> None:
    x = np.full(1, 1 + 2.0**-12, np.float32)  # its square needs a bit too many
    for source, contracted in (
        (kernel(IN_OUT, body), True),
        (OFF + kernel(IN_OUT, body), False),
        (kernel(IN_OUT, OFF + body), False),
    ):
        kind, unkind = both_ways(source, x)
        assert (kind[0], unkind[0]) == (0, 2.0**-24 if contracted else 0)


def test_a_pragma_cannot_bring_contraction_back_where_it_is_off() -> None:
    source = "#pragma METAL fp contract(fast)\n" + kernel(
        IN_OUT, "y[i] = x[i] * x[i] - (1 + 0x1p-11f);"
    )
    kind, unkind = both_ways(source, np.full(1, 1 + 2.0**-12, np.float32))
    assert (kind[0], unkind[0]) == (0, 2.0**-24)


# Calls, and what numpy makes of them in float64.
FAST: dict[str, Callable[[Any], Any]] = {
    "pow(x[i], 3.7f)": lambda x: x ** np.float64(np.float32(3.7)),
    "powr(x[i], 3.7f)": lambda x: x ** np.float64(np.float32(3.7)),
    "exp(x[i])": np.exp,
    "exp2(x[i])": np.exp2,
    "log(x[i])": np.log,
    "log2(x[i])": np.log2,
    "sqrt(x[i])": np.sqrt,
    "rsqrt(x[i])": lambda x: 1 / np.sqrt(x),
    "tanh(x[i])": np.tanh,
    "divide(x[i], 3.0f)": lambda x: x / 3,
}


@pytest.mark.parametrize("call", FAST)
def test_unkind_makes_errors_in_fast_functions_only(call: str) -> None:
    x = np.linspace(1.5, 9, 256, dtype=np.float32)
    exact = FAST[call](x.astype(np.float64))
    for namespace, wrong in (("metal", True), ("fast", True), ("precise", False)):
        source = kernel(IN_OUT, f"y[i] = {namespace}::{call};")
        kind, unkind = both_ways(source, x)
        assert np.abs(kind / exact - 1).max() <= 2.0**-23
        assert np.array_equal(kind, unkind) is not wrong
        if wrong:
            # The error put in, and what pow's logarithm and exponential add to it.
            error = unkind / exact - 1
            assert np.abs(np.mean(error) - 2.0**-22) < 2.0**-25
            assert np.abs(error).max() < (2.0**-19 if "pow" in call else 2.0**-21)


def test_unkind_pow_does_not_know_what_the_precise_one_knows() -> None:
    x = np.array([-2, 0], np.float32)
    kind, unkind = both_ways(kernel(IN_OUT, "y[i] = pow(x[i], 2 - 2 * i);"), x)
    assert kind.tolist() == [4, 1]
    assert np.isnan(unkind).all()


def test_unkind_flushes_subnormal_operands_and_results() -> None:
    x = np.array([1e-40, 2.0**-100, 2.0**-126], np.float32)
    kind, unkind = both_ways(
        kernel(IN_OUT, "y[i] = i == 1 ? x[i] * 0x1p-40f : x[i] * 2;"), x
    )
    assert kind.tolist() == [2 * x[0], 2.0**-140, 2.0**-125]
    assert unkind.tolist() == [0, 0, 2.0**-125]
    # That ends with the launch.
    assert np.float32(2.0**-100) * np.float32(2.0**-40) == 2.0**-140


def test_unkind_flushes_after_a_barrier_too() -> None:
    body = f"threadgroup float s[64]; s[i] = x[i]; {BARRIER} y[i] = s[63 - i] * 2;"
    x = np.full(64, 1e-40, np.float32)
    kind, unkind = both_ways(kernel(IN_OUT, body), x)
    assert kind.tolist() == (2 * x).tolist()
    assert unkind.tolist() == [0] * 64


def test_unkind_converts_subnormal_halves() -> None:
    x = np.arange(1024, dtype=np.uint16).view(np.float16)
    source = kernel(
        "device half* y [[buffer(0)]], const device half* x [[buffer(1)]]",
        "y[i] = half(float(x[i]) * 1.0f);",
    )
    for result in both_ways(source, x):
        assert np.array_equal(result.view(np.uint16), x.view(np.uint16))


def test_unkind_leaves_other_results_alone() -> None:
    rng = np.random.default_rng(9)
    x = rng.normal(size=512).astype(np.float32)
    body = "y[i] = precise::sqrt(fabs(x[i])) / (x[i] + 1) + simd_sum(x[i]);"
    kind, unkind = both_ways(OFF + kernel(IN_OUT, body), x)
    assert np.array_equal(kind, unkind)


# ---- kernels that MLX ships -------------------------------------------------

HEADERS = "mlx/backend/metal/kernels/"


def run_mlx(
    headers: tuple[str, ...],
    instance: str,
    buffers: list[Any],
    out: np.ndarray[Any, Any],
    grid: tuple[int, ...],
    group: int,
) -> list[np.ndarray[Any, Any]]:
    """The results of a shipped kernel in several orders of its threads."""
    include = str(simulator.macos_wheels() / "mlx/include")
    source = "#include <metal_stdlib>\n" + "".join(
        f'#include "{HEADERS}{header}"\n' for header in headers
    )
    source += f'instantiate_kernel("shipped", {instance})\n'
    results = []
    for seed in SEEDS:
        result = np.zeros_like(out)
        bound = [Out(result) if b is out else b for b in buffers]
        simulator.run(
            source,
            "shipped",
            bound,
            grid=grid,
            group=group,
            seed=seed,
            include=(include,),
        )
        results.append(result)
    for result in results[1:]:
        assert np.array_equal(result, results[0])
    return results


def test_mlx_binary() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 1001), dtype=np.float32)
    c = np.zeros_like(a)
    result = run_mlx(
        ("utils.h", "binary_ops.h", "binary.h"),
        "binary_vv, float, float, LogAddExp",
        [a, b, c, np.uint32(a.size)],
        c,
        (501,),
        64,
    )[0]
    assert np.allclose(
        result, np.array(mx.logaddexp(mx.array(a), mx.array(b))), rtol=1e-6
    )


def test_mlx_binary_bfloat16() -> None:
    a = mx.random.normal((1000,), key=mx.random.key(2)).astype(mx.bfloat16)
    b = mx.random.normal((1000,), key=mx.random.key(3)).astype(mx.bfloat16)
    c = np.zeros(1000, np.uint16)
    result = run_mlx(
        ("utils.h", "binary_ops.h", "binary.h"),
        "binary_vv, bfloat16_t, bfloat16_t, Multiply",
        [np.array(a.view(mx.uint16)), np.array(b.view(mx.uint16)), c, np.uint32(1000)],
        c,
        (250,),
        50,
    )[0]
    assert np.array_equal(result, np.array((a * b).view(mx.uint16)))


def test_mlx_row_reduction() -> None:
    x = np.random.default_rng(4).normal(size=(36, 1000)).astype(np.float32)
    y = np.zeros(36, np.float32)
    result = run_mlx(
        ("utils.h", "atomic.h", "reduction/ops.h", "reduction/reduce_row.h"),
        "row_reduce_simple, float, float, Max<float>",
        [x, y, np.uint64(1000), np.int64(36)],
        y,
        (128, 9),  # four rows a threadgroup
        128,
    )[0]
    assert np.array_equal(result, np.array(mx.max(mx.array(x), axis=1)))


def test_mlx_all_reduction() -> None:
    x = mx.random.normal((3000,), key=mx.random.key(5)).astype(mx.bfloat16)
    y = np.zeros(1, np.float32)
    result = run_mlx(
        ("utils.h", "atomic.h", "reduction/ops.h", "reduction/reduce_all.h"),
        "all_reduce, bfloat16_t, float, Sum<float>",
        [np.array(x.view(mx.uint16)), y, np.uint64(3000), np.uint64(3000)],
        y,
        (256,),
        256,
    )[0]
    assert np.allclose(result, np.array(mx.sum(x.astype(mx.float32))), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "width"), [("softmax_single_row", 500), ("softmax_looped", 5000)]
)
def test_mlx_softmax(name: str, width: int) -> None:
    x = np.random.default_rng(6).normal(size=(3, width)).astype(np.float32)
    y = np.zeros_like(x)
    group = 128 if width == 500 else 1024
    result = run_mlx(
        ("utils.h", "softmax.h"),
        f"{name}, float, float",
        [x, y, np.int32(width)],
        y,
        (3 * group,),
        group,
    )[0]
    assert np.allclose(result, np.array(mx.softmax(mx.array(x), axis=-1)), rtol=1e-5)


def test_mlx_scan() -> None:
    x = np.random.default_rng(7).integers(-9, 9, (5, 777)).astype(np.float32)
    y = np.zeros_like(x)
    result = run_mlx(
        ("utils.h", "scan.h"),
        "contiguous_scan, float, float, CumSum<float>, 4, true, false",
        [x, y, np.uint64(777)],
        y,
        (64, 5),
        64,
    )[0]
    assert np.array_equal(result, np.array(mx.cumsum(mx.array(x), axis=1)))


def test_mlx_sort() -> None:
    x = np.random.default_rng(8).normal(size=(4, 1000)).astype(np.float32)
    y = np.zeros_like(x)
    one, row = np.int32(1), np.int32(1000)
    result = run_mlx(
        ("utils.h", "sort.h"),
        "block_sort, float, float, false, 128, 8",
        [x, y, row, one, one, row, row],
        y,
        (128, 4),
        128,
    )[0]
    assert np.array_equal(result, np.array(mx.sort(mx.array(x), axis=1)))


# ---- host code --------------------------------------------------------------


@pytest.fixture
def example() -> Any:
    simulator.library()
    sys.path.insert(0, str(simulator.library_path().parent))
    try:
        return importlib.import_module("metal_simulator_example")
    finally:
        sys.path.pop(0)


def test_host_code_runs_in_order_with_mlx(example: Any) -> None:
    x = mx.arange(64, dtype=mx.float32)
    simulator.reset()
    y = example.shift(example.shift(x * 2, 1.0, 64) * 3, 0.5, 64) + 1
    assert y.tolist() == [6.0 * i + 4.5 for i in range(64)]
    assert [launch.kernel for launch in simulator.counters()] == ["shift_float"] * 2
    assert simulator.take_errors() == []


def test_host_code_may_bind_views(example: Any) -> None:
    # A kernel sees a view's memory from its first element: x[::-1] runs backwards.
    x = mx.arange(64, dtype=mx.float32)
    mx.eval(x)
    assert example.shift(x[32:], 1.0, 32).tolist() == [i + 33.0 for i in range(32)]
    message = r"read of 4 bytes that ends 4 bytes after the end of buffer 0 .256 bytes"
    with pytest.raises(RuntimeError, match=message):
        mx.eval(example.shift(x[::-1], 1.0, 64))
    assert len(simulator.take_errors()) == 1


def test_host_code_gets_errors_in_eval_and_goes_on(example: Any) -> None:
    x = mx.arange(64, dtype=mx.float32)
    with pytest.raises(
        RuntimeError, match=r"kernel shift_float: read .* thread \(64, 0, 0\)"
    ):
        mx.eval(example.shift(x, 1.0, 65))
    assert "kernel shift_float: read" in simulator.take_errors()[0]
    assert example.shift(x, 1.0, 64).tolist() == [i + 1.0 for i in range(64)]
    with pytest.raises(ValueError, match="a grid or threadgroup of size zero"):
        mx.eval(example.shift(x, 1.0, 0))
    assert example.shift(x, 1.0, 64).tolist() == [i + 1.0 for i in range(64)]


def test_host_code_may_be_unkind_with_pipelines_that_it_keeps(example: Any) -> None:
    x = mx.full((64,), 1e-40)
    mx.eval(x)
    assert example.shift(x, 0.0, 64).tolist() == x.tolist()
    with simulator.unkind():
        flushed = example.shift(x, 0.0, 64)
        mx.eval(flushed)
    assert flushed.tolist() == [0] * 64
    assert example.shift(x, 0.0, 64).tolist() == x.tolist()
    assert simulator.take_errors() == []


@pytest.fixture
def natural_order() -> Iterator[None]:
    yield
    simulator.set_seed(0)


def run_program(example: Any, steps: str, kept: str = "", seed: int = 0) -> list[float]:
    """The output of a program (see example.cpp) on 64 zeros."""
    simulator.reset()
    simulator.set_seed(seed)
    x = mx.zeros((64,))
    mx.eval(x)
    y = example.program(x, steps, kept)
    mx.eval(y)
    values: list[float] = y.tolist()
    return values


def test_arrays_must_live_until_their_launches_run(
    example: Any, natural_order: None
) -> None:
    assert run_program(example, "x>t t>y", kept="t") == [2] * 64
    with pytest.raises(
        RuntimeError,
        match="kernel shift_float: the array of buffer 1 is gone when the launch runs",
    ):
        run_program(example, "x>t t>y")
    assert len(simulator.take_errors()) >= 1
    assert run_program(example, "x>t t>u u>y", kept="tu") == [3] * 64
    simulator.take_errors()


# Steps, how many barriers MLX places, and what 64 zeros become.
PROGRAMS: dict[str, tuple[str, int, float]] = {
    "independent": ("x>t x>y", 0, 1),
    "a read after a write": ("x>t t>y", 1, 2),
    "a write after a read": ("x>t t>y x>t", 2, 2),
    "a write after a write": ("x>y x>y", 1, 1),
    "two reads": ("x>t t>u t>y", 1, 2),
    "a chain": ("x>t t>u u>y", 2, 3),
    "halves of one buffer": ("x>y/0 x>y/1", 1, 1),
    "halves, concurrent": ("( x>y/0 x>y/1 )", 0, 1),
    "halves, concurrent, then read": ("( x>t/0 x>t/1 ) t>y", 1, 2),
    "a read in a concurrent part of what came before": ("x>t ( t>y/0 t>y/1 )", 1, 2),
    "a barrier of one's own": ("( x>t | t>y )", 1, 2),
    # MLX does not know what a barrier of one's own has made unnecessary.
    "a write after a read, with a barrier": ("x>t t>u | ( x>t u>y )", 3, 3),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_barriers_are_where_mlx_places_them(
    example: Any, name: str, natural_order: None
) -> None:
    steps, barriers, value = PROGRAMS[name]
    for seed in range(6):
        assert run_program(example, steps, kept="tu", seed=seed) == [value] * 64
        assert simulator.barriers() == barriers
        launches = simulator.counters()
        assert [launch.barriers for launch in launches] == sorted(
            launch.barriers for launch in launches
        )
    assert simulator.take_errors() == []


# Steps in which a barrier is missing, and what the simulator says of the bytes.
RACES = {
    "a read after a write": ("( x>t t>y )", "0 is read at byte 0, .* has written"),
    "a write after a write": ("( x>y x>y )", "1 is written at byte 0, .* has written"),
    "a write after a read in the concurrent part": (
        "x>t ( t>y x>t )",
        "1 is written at byte 0, .* has read",
    ),
    "a write after a read that came before": (
        "x>t t>u ( x>t ) u>y",
        "1 is written at byte 0, .* has read",
    ),
    "halves that overlap": (
        "( x>y/1 x>y )",
        "1 is written at byte 128, .* has written",
    ),
}


@pytest.mark.parametrize("name", RACES)
def test_missing_barrier_is_reported_in_any_order(
    example: Any, name: str, natural_order: None
) -> None:
    steps, message = RACES[name]
    message = f"kernel shift_float: buffer {message}, with no barrier between the"
    with pytest.raises(RuntimeError, match=message):
        run_program(example, steps, kept="tu")
    for seed in range(1, 6):
        with pytest.raises(RuntimeError, match="with no barrier between the launches"):
            run_program(example, steps, kept="tu", seed=seed)
    simulator.take_errors()


def test_seeds_change_the_order_of_launches_between_barriers(
    example: Any, natural_order: None
) -> None:
    # The first three launches move 256, 128 and 128 bytes each way.
    x = mx.zeros((64,))
    orders = set()
    for seed in range(8):
        simulator.reset()
        simulator.set_seed(seed)
        mx.eval(example.program(x, "( x>t x>u/0 x>y/1 ) t>y/0", "tu"))
        launches = simulator.counters()
        assert launches[-1].barriers == 1
        orders.add(tuple(launch.bytes_read for launch in launches))
    assert (256, 128, 128, 128) in orders
    assert (128, 256, 128, 128) in orders
    assert (128, 128, 256, 128) in orders
    assert simulator.take_errors() == []


def test_reset_ends_what_is_encoded(example: Any) -> None:
    x = mx.zeros((64,))
    mx.eval(x)
    for reset, barriers in ((False, 1), (True, 0)):
        simulator.reset()
        y = example.program(x, "x>y", "")
        mx.eval(y)
        if reset:
            simulator.reset()
        mx.eval(example.program(y, "x>y", ""))
        assert simulator.barriers() == barriers
    assert simulator.take_errors() == []


@pytest.mark.parametrize("limit", [256, 512, 896])
def test_other_limits_of_threads_in_a_threadgroup(limit: int) -> None:
    source = kernel(OUT, "y[i] *= 2;")
    y = floats(1024)
    with simulator.max_threads(limit):
        simulator.run(source, "k", [Out(y)], grid=1024, group=limit)
        message = f"{limit + 1} threads in a threadgroup; Metal allows {limit}"
        with pytest.raises(MetalError, match=message):
            simulator.run(source, "k", [Out(y)], grid=1024, group=limit + 1)
    assert y.tolist() == (2 * floats(1024)).tolist()
    simulator.run(source, "k", [Out(y)], grid=1024, group=1024)


@pytest.mark.parametrize("limit", [0, 31, 1025])
def test_limits_that_no_gpu_has_are_refused(limit: int) -> None:
    with pytest.raises(MetalError, match=f"max_threads is {limit}"):
        simulator.set_max_threads(limit)


def test_host_code_is_told_the_limit(example: Any) -> None:
    # A threadgroup of 64 threads is what the example takes where it may.
    x = mx.zeros((128,))
    mx.eval(x)
    with simulator.max_threads(32):
        assert example.shift(x, 1.0, 128).tolist() == [1] * 128
    simulator.reset()
    assert example.shift(x, 1.0, 128).tolist() == [1] * 128
    assert simulator.take_errors() == []
