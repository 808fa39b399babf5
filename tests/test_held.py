"""The formulas of metal/formats.h, on the CPU, on Metal and as plain operations."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from conftest import SIMULATOR
from held_reference import (
    ADDED,
    KINDS,
    ROOT_ERRORS,
    Array,
    Floats,
    as_float32,
    assert_same_bits,
    bits_of,
    block_scales,
    decoded,
    encoded,
    encoded_by_a_step,
    error_bound,
    everything,
    exact_roots,
    most_of,
    rounded_roots,
    spacing,
    weights_of_a_step,
    whole_codes,
)
from mlx_fused_optimizers._kernels import kernels
from support import snapshot, to_numpy

pytestmark = pytest.mark.fused
SMALLEST_NORMAL = 2.0**-126
LARGEST = float(np.finfo(np.float32).max)
every_kind = pytest.mark.parametrize("kind", KINDS)
signed_and_positive = pytest.mark.parametrize(
    "is_positive", [False, True], ids=["signed", "positive"]
)


# Codes


def ties(kind: str, is_positive: bool) -> Floats:
    """Values whose roots lie as near the middle of two codes as may be told apart."""
    most, block = most_of(kind, is_positive), KINDS[kind].block
    middles = np.arange(most) + 0.5
    if kind == "int4":
        middles = np.sqrt(np.maximum(middles**2 - ADDED[is_positive], 0))
    error = ROOT_ERRORS[is_positive] * middles
    near = np.concatenate([middles - 1.1 * error, middles, middles + 1.1 * error])
    values = (near / most) ** (4 if is_positive else 2)
    padded = np.pad(values, (0, -values.size % (block - 1)))
    rows = padded.reshape(-1, block - 1)
    with_largest = np.concatenate([np.ones((len(rows), 1)), rows], -1)
    scales = 10.0 ** np.linspace(-25, 25, len(rows))[:, None]
    return (with_largest * scales).astype(np.float32).reshape(-1)


def blocks_of_normal_values(kind: str, is_positive: bool) -> dict[str, Floats]:
    """Blocks without denormals, by what is special about them."""
    rng = np.random.default_rng(0)
    block = KINDS[kind].block
    normal = rng.standard_normal((3000, block)) * 10.0 ** rng.uniform(
        -20, 20, (3000, 1)
    )
    wide = 10.0 ** rng.uniform(-30, 0, (500, block)) * rng.choice([-1, 1], (500, block))
    alone = np.zeros((block, block))
    np.fill_diagonal(alone, 10.0 ** np.linspace(-37, 38, block))
    huge = rng.uniform(-1, 1, (50, block)) * LARGEST
    huge[:, 7] = -LARGEST
    return {
        "normal": normal.astype(np.float32),
        "wide": wide.astype(np.float32),
        "alone": alone.astype(np.float32),
        "huge": huge.astype(np.float32),
        "ties": ties(kind, is_positive),
        "equal": np.full(3 * block, -0.3, np.float32),
        "zero": np.zeros(3 * block, np.float32),
        **{
            f"tail{size}": (10 * rng.standard_normal(size)).astype(np.float32)
            for size in (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 129, 4097)
        },
    }


@every_kind
@signed_and_positive
def test_a_code_is_the_root_to_half_a_code(kind: str, is_positive: bool) -> None:
    for label, values in blocks_of_normal_values(kind, is_positive).items():
        x = np.abs(values) if is_positive else values
        codes, scales = encoded(x, kind, is_positive)
        flat = x.reshape(-1)
        q = whole_codes(codes, kind, is_positive, flat.size)
        np.testing.assert_array_equal(scales, block_scales(x, kind), label)
        roots = rounded_roots(flat, kind, is_positive)
        exact = exact_roots(flat, kind, is_positive)
        allowed = 0.5 + exact * ROOT_ERRORS[is_positive]
        is_least = is_positive & (q == 1) & (roots < 0.5) & (flat > 0)
        assert np.all((np.abs(np.abs(q) - roots) <= allowed) | is_least), label
        assert np.all(np.sign(q) * np.sign(flat) >= 0), label
        assert np.abs(q).max() <= most_of(kind, is_positive), label
        if is_positive:
            np.testing.assert_array_equal(q == 0, flat == 0, label)

        decoded_by_us = kernels.decode(
            mx.array(codes), mx.array(scales), x.shape, kind, is_positive
        )
        restored = np.array(decoded_by_us).astype(np.float64)
        assert restored.shape == x.shape
        meant = decoded(q, scales, kind, is_positive).reshape(x.shape)
        # Below float32's normal range by a denormal's rounding.
        np.testing.assert_allclose(restored, meant, rtol=1e-6, atol=2e-45)
        bound = error_bound(flat, kind, is_positive).reshape(x.shape)
        assert np.all(np.abs(restored - x) <= bound + 2e-45), label


@every_kind
@signed_and_positive
def test_denormals(kind: str, is_positive: bool) -> None:
    """They are lost at most, beside normal values and alone, and never enlarged."""
    rng = np.random.default_rng(1)
    block = KINDS[kind].block
    denormal = as_float32(rng.integers(1, 1 << 23, (400, block)))
    denormal[0] = as_float32(np.arange(1, block + 1))
    denormal[200:, 0] = np.float32(10.0) ** np.linspace(-37, 3, 200, dtype=np.float32)
    signs = 1 if is_positive else rng.choice([-1, 1], denormal.shape)
    x = (denormal * signs).astype(np.float32).reshape(-1)
    codes, scales = encoded(x, kind, is_positive)
    np.testing.assert_array_equal(scales, block_scales(x, kind))
    q = whole_codes(codes, kind, is_positive, x.size)
    if is_positive:
        assert q.min() == 1
    restored = decoded(q, scales, kind, is_positive)
    bound = np.maximum(error_bound(x, kind, is_positive), SMALLEST_NORMAL)
    assert np.all(np.abs(restored - x) <= bound)
    assert np.all(np.sign(q) * np.sign(x) >= 0)


def every_code(kind: str, is_positive: bool) -> Array:
    """Rows of codes, in each of which is the largest, as in all that is encoded."""
    most, block = most_of(kind, is_positive), KINDS[kind].block
    values = np.arange(0 if is_positive else -most, most + 1)
    rows = np.pad(values, (0, -values.size % (block - 1))).reshape(-1, block - 1)
    return np.concatenate([np.full((len(rows), 1), most), rows], -1)


def packed(q: Array, kind: str, is_positive: bool) -> Array:
    if kind == "int8":
        return q.astype(np.uint8 if is_positive else np.int8)
    pairs = (q.reshape(-1, 2) & 15).astype(np.uint8)
    packed: Array = pairs[:, 0] | pairs[:, 1] << 4
    return packed


@every_kind
@signed_and_positive
def test_every_code_comes_back(backend: str, kind: str, is_positive: bool) -> None:
    """Of what a code stands for, at any scale; by plain operations and by a kernel."""
    rows = every_code(kind, is_positive)
    scales = 10.0 ** np.arange(-25, 26.0)
    q = np.tile(rows, (len(scales), 1)).reshape(-1)
    scales = np.repeat(scales, len(rows)).astype(np.float32)
    codes = packed(q, kind, is_positive)
    values = kernels.decode(
        mx.array(codes), mx.array(scales), q.shape, kind, is_positive
    )
    again = encoded(np.array(values), kind, is_positive)
    np.testing.assert_array_equal(again[0].reshape(codes.shape), codes)
    np.testing.assert_array_equal(again[1], scales)

    # A step that leaves its moment: momentum and alpha are 1, the gradient is 0.
    shared: Any = {"state_dtype": kind, "quantize_filter": everything}
    optimizer: Any = optim.SGD(0.1, momentum=1.0, **shared)
    if is_positive:
        optimizer = optim.RMSprop(0.1, alpha=1.0, **shared)
    zeros = {"w": mx.zeros(q.size)}
    optimizer.init(zeros)
    before = {f"v_{kind}": mx.array(codes), "v_scales": mx.array(scales)}
    optimizer.state["w"] = dict(before)
    optimizer.apply_gradients(zeros, zeros)
    assert snapshot(optimizer.state["w"]) == snapshot(before)


def assert_kernel_agrees(x: Floats, kind: str, is_positive: bool, label: str) -> None:
    given = np.abs(x) if is_positive else x
    pairs = zip(
        encoded_by_a_step(given, kind, is_positive),
        encoded(given, kind, is_positive),
        strict=True,
    )
    for found, expected in pairs:
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), label
        np.testing.assert_array_equal(found, expected, label)


@every_kind
@signed_and_positive
def test_kernels_give_the_codes_of_plain_operations(
    backend: str, kind: str, is_positive: bool
) -> None:
    for label, x in blocks_of_normal_values(kind, is_positive).items():
        assert_kernel_agrees(x, kind, is_positive, label)
    rng = np.random.default_rng(2)
    count = 100_003 if backend == SIMULATOR else 3_000_001
    # Any bits but those of infinities and NaN: blocks reach over all exponents.
    bits = rng.integers(0, 0x7F800000, count) | rng.integers(0, 2, count) << 31
    assert_kernel_agrees(as_float32(bits), kind, is_positive, "any bits")
    # Of few exponents, denormals among them.
    bits = rng.integers(0, 0x1000000, count) | rng.integers(0, 2, count) << 31
    assert_kernel_agrees(as_float32(bits), kind, is_positive, "small")
    bits = rng.integers(0x3F000000, 0x41000000, count)
    assert_kernel_agrees(as_float32(bits), kind, is_positive, "one")


@every_kind
@signed_and_positive
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_block(
    backend: str, kind: str, is_positive: bool, bad: float
) -> None:
    block = KINDS[kind].block
    x = np.random.default_rng(3).standard_normal(5 * block + 3).astype(np.float32)
    x[block : block + 5] = 0
    spoiled = x.copy()
    spoiled[[block + 9, 5 * block]] = bad
    if is_positive:
        x, spoiled = np.abs(x), np.abs(spoiled)
    assert_kernel_agrees(spoiled, kind, is_positive, str(bad))
    codes, scales = encoded_by_a_step(spoiled, kind, is_positive)
    good, good_scales = encoded_by_a_step(x, kind, is_positive)
    expected = np.full(6, True)
    expected[[1, 5]] = False
    np.testing.assert_array_equal(np.isfinite(scales), expected)
    np.testing.assert_array_equal(scales[expected], good_scales[expected])
    values = kernels.decode(
        mx.array(codes), mx.array(scales), x.shape, kind, is_positive
    )
    stays = np.repeat(expected, block)[: x.size]
    np.testing.assert_array_equal(np.isfinite(np.array(values)), stays)
    pair = [whole_codes(c, kind, is_positive, x.size) for c in (codes, good)]
    np.testing.assert_array_equal(pair[0][stays], pair[1][stays])


# Masters

# Of a float32's lower 16 bits: the ends, what lies about the middles of bfloat16 and
# of the error's 8 bits, and some more.
LOWER = np.array(
    [
        *(0, 1, 2, 0x7E, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x17F, 0x180, 0x181, 0x7E7F),
        *(0x7E80, 0x7EFF, 0x7F00, 0x7F01, 0x7F7F, 0x7F80, 0x7F81, 0x7FFE, 0x7FFF),
        *(0x8000, 0x8001, 0x807F, 0x8080, 0x8081, 0x80FF, 0x8100, 0x8180, 0xFE80),
        *(0xFEFF, 0xFF00, 0xFF7F, 0xFF80, 0xFF81, 0xFFFE, 0xFFFF),
    ],
    np.uint32,
)


def float32_bits(chunk: int) -> Iterator[Array]:
    """All float32 values if MLX_FUSED_TEST_ALL is set; all upper halves."""
    if os.environ.get("MLX_FUSED_TEST_ALL"):
        for start in range(0, 1 << 32, 1 << 25):
            yield np.arange(start, start + (1 << 25), dtype=np.uint64).astype(np.uint32)
        return
    rng = np.random.default_rng(4)
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    for start in range(0, 1 << 16, chunk):
        more = rng.integers(0, 1 << 16, (chunk, 10), np.uint32)
        lower = np.concatenate([np.broadcast_to(LOWER, (chunk, LOWER.size)), more], -1)
        yield (upper[start : start + chunk] | lower).reshape(-1)


def test_bfloat16_masters_of_all_float32() -> None:
    """A float32 is a weight's bits and a rest: the rest of 16 bits is exact.

    So is the weight then the nearest, for a rest is between -2^15 and 2^15 - 1 of the
    2^16 values in the interval. In 8 bits it is off by 1/254 of that at most.
    """
    mx.set_default_device(mx.cpu)
    for bits in float32_bits(1 << 14):
        x = as_float32(bits)
        nan = np.isnan(x)
        results = {}
        for master in ("32bit", "24bit"):
            weight, state = weights_of_a_step(x, mx.bfloat16, master_weights=master)
            error = np.array(state["w"]["error"])
            results[master] = weight = bits_of(weight)
            unit = 1 if master == "32bit" else 256
            joined = (weight.astype(np.int64) << 16) + error.astype(np.int64) * unit
            difference = np.abs(joined - bits.astype(np.int64))
            assert difference[~nan].max() <= (0 if unit == 1 else 65536 / 254)
            # A weight beside infinity may be finite only as a master.
            assert not np.any(np.isinf(as_float32(joined[~nan])) & ~np.isinf(x[~nan]))
            assert np.all((weight[nan] & 0x7FFF) > 0x7F80)
            assert not error[nan].any()
            assert error.min() >= (-32768 if unit == 1 else -127)
        np.testing.assert_array_equal(results["32bit"], results["24bit"])


def test_bfloat16_weights_are_the_nearest() -> None:
    mx.set_default_device(mx.cpu)
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 0x7F7F0000, 1_000_000).astype(np.uint32)
    bits[: 1 << 14] = (bits[: 1 << 14] & 0xFFFF0000) | 0x8000  # in the middle
    x = as_float32(bits | rng.integers(0, 2, bits.size).astype(np.uint32) << 31)
    weight, _ = weights_of_a_step(x, mx.bfloat16, master_weights="24bit")
    upper = x.view(np.uint32) & 0xFFFF0000
    below, above = (np.abs(as_float32(b)).astype(float) for b in (upper, upper + 65536))
    size = np.abs(x).astype(float)
    expected = np.where(above - size <= size - below, above, below) * np.sign(x)
    np.testing.assert_array_equal(to_numpy(weight), expected)


def float16_values() -> Floats:
    """About every float16 of normal size, ends and middles of the intervals."""
    halves = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(np.float16)
    rng = np.random.default_rng(6)
    lower = [0, 1, 15, 16, 17, 31, 32, 33, 0xFFF, 0x1000, 0x1001, 0x1FF0, 0x1FFF]
    more = rng.integers(0, 1 << 13, (halves.size, 7), np.uint32)
    same = np.broadcast_to(np.array(lower, np.uint32), (halves.size, len(lower)))
    bits = halves.astype(np.float32).view(np.uint32)[:, None]
    x = as_float32((bits | np.concatenate([same, more], -1)).reshape(-1))
    x = x[x < 65520]  # what is not below rounds to infinity
    return np.concatenate([x, -x])


@pytest.mark.parametrize("master", ["24bit", "32bit"])
def test_float16_masters(master: str) -> None:
    mx.set_default_device(mx.cpu)
    for is_small in (False, True):
        x = float16_values()
        interval = 2.0 ** (np.floor(np.log2(np.abs(x.astype(float)))) - 10)
        if is_small:  # where float16's values are evenly spaced
            rng = np.random.default_rng(7)
            x = (rng.uniform(-1, 1, 300_000) * 2.0**-14).astype(np.float32)
            x[:3] = 2.0**-24, 2.0**-25, 1.5 * 2.0**-24
            interval = np.full(x.shape, 2.0**-24)
        weight, state = weights_of_a_step(x, mx.float16, master_weights=master)
        np.testing.assert_array_equal(to_numpy(weight), x.astype(np.float16))
        joined = np.array(kernels.join(weight, state["w"]["error"])).astype(float)
        if master == "24bit":
            assert np.all(np.abs(joined - x) <= interval / 254)
        elif is_small:
            assert np.abs(joined - x).max() <= 2.0**-40
        else:
            np.testing.assert_array_equal(joined, x)


@pytest.mark.parametrize("master", ["24bit", "32bit"])
def test_float16_masters_beyond_its_range(backend: str, master: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 65519.9, 65520, -1e30, 0], np.float32)
    weight, state = weights_of_a_step(x, mx.float16, master_weights=master)
    joined = np.array(kernels.join(weight, state["w"]["error"]))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(to_numpy(weight), x.astype(np.float16))
    expected = np.array([np.inf, -np.inf, np.nan, 65519.9, np.inf, -np.inf, 0])
    np.testing.assert_allclose(joined, expected, rtol=1e-5)


@pytest.mark.parametrize("master", ["24bit", "32bit"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_kernels_split_and_join_as_plain_operations(
    backend: str, master: str, dtype: mx.Dtype
) -> None:
    count = 200_003 if backend == SIMULATOR else 3_000_001
    rng = np.random.default_rng(8)
    bits = rng.integers(0, 1 << 32, count, np.uint32)
    special = np.concatenate([as_float32(LOWER), as_float32(LOWER << 8)])
    near_one = rng.standard_normal(count).astype(np.float32)
    x = np.concatenate([as_float32(bits), special, np.ldexp(special, 120), near_one])
    if dtype == mx.float16:
        x = np.concatenate([x, float16_values()[: count // 2]])
    weight, state = weights_of_a_step(x, dtype, master_weights=master)
    expected_weight, expected_error = kernels.split(mx.array(x), master, dtype)
    error = state["w"]["error"]
    assert error.dtype == expected_error.dtype
    assert_same_bits(weight, expected_weight)
    np.testing.assert_array_equal(np.array(error), np.array(expected_error))

    # A step of nothing: the kernel joins the two, and splits their sum.
    optimizer = optim.SGD(1.0, master_weights=master)
    zeros = {"w": -mx.zeros(x.shape)}
    optimizer.init({"w": weight})
    optimizer.state["w"] = {"error": error}
    again = optimizer.apply_gradients(zeros, {"w": weight})["w"]
    joined = kernels.join(weight, error)
    expected_weight, expected_error = kernels.split(joined, master, dtype)
    assert_same_bits(again, expected_weight)
    found = np.array(optimizer.state["w"]["error"])
    np.testing.assert_array_equal(found, np.array(expected_error))
    if dtype == mx.bfloat16:
        assert_same_bits(again, weight)
        np.testing.assert_array_equal(found, np.array(error))


# Stochastic rounding


def rounded_by_a_step(x: Floats, dtype: mx.Dtype, seed: int, step: int = 1) -> mx.array:
    optimizer = optim.SGD(1.0, stochastic_rounding=True)
    optimizer.init({"w": mx.zeros(1, dtype)})
    optimizer.state["rounding_seed"] = mx.array(seed, mx.uint32)
    optimizer.state["step"] = mx.array(step - 1, mx.uint64)
    weights = {"w": -mx.zeros(x.shape, dtype)}
    rounded: mx.array = optimizer.apply_gradients({"w": mx.array(-x)}, weights)["w"]
    return rounded


def rounded(
    x: Floats, dtype: mx.Dtype, seed: int, step: int = 1, tensor: int = 0
) -> mx.array:
    """The same by plain operations."""
    numbers = (mx.array(seed, mx.uint32), mx.array(step, mx.uint64))
    return kernels.round_stochastically(mx.array(x), dtype, *numbers, tensor)


# The last three of each are about its smallest normal value.
BINADES = [
    *[(mx.bfloat16, exponent) for exponent in (0, 100, -126, -127, -130)],
    *[(mx.float16, exponent) for exponent in (0, 14, -14, -15, -20, -25)],
]


@pytest.mark.parametrize(("dtype", "exponent"), BINADES, ids=str)
def test_stochastic_rounding_keeps_the_mean(dtype: mx.Dtype, exponent: int) -> None:
    """Within 4 standard deviations of 10^7 roundings; of any part of an interval."""
    mx.set_default_device(mx.cpu)
    parts = 16
    totals, variances = np.zeros((2, parts))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        exact = rng.uniform(1, 2, 2_000_000) * 2.0**exponent
        x = (exact * rng.choice([-1, 1], exact.size)).astype(np.float32)
        # In magnitude, or a bias to zero would not show: signs would cancel it.
        found = to_numpy(rounded_by_a_step(x, dtype, seed)).astype(float) * np.sign(x)
        wide = np.abs(x.astype(float))
        space = spacing(wide, dtype)
        low = np.floor(wide / space)
        share = wide / space - low
        up = found / space - low
        assert np.all((up == 0) | (up == 1))
        assert np.all((up == 0) | (share > 0))
        part = np.minimum((share * parts).astype(int), parts - 1)
        totals += np.bincount(part, up - share, parts)
        variances += np.bincount(part, share * (1 - share), parts)
    assert abs(totals.sum()) <= 4 * np.sqrt(variances.sum())
    assert np.all(np.abs(totals) <= 4.5 * np.sqrt(variances))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_stochastic_rounding_keeps_what_is_exact(backend: str, dtype: mx.Dtype) -> None:
    halves = mx.view(mx.arange(1 << 16).astype(mx.uint16), dtype)
    x = to_numpy(halves.astype(mx.float32))
    found = to_numpy(rounded_by_a_step(x, dtype, 3).astype(mx.float32))
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_random_bits_are_the_same_everywhere(backend: str, dtype: mx.Dtype) -> None:
    count = 100_003 if backend == SIMULATOR else 2_000_003
    rng = np.random.default_rng(9)
    x = (rng.standard_normal(count) * 10.0 ** rng.uniform(-9, 4, count)).astype("f4")
    threads = kernels.num_threads()
    try:
        for seed, step in ((0, 1), (0xFFFFFFFF, 70_000)):
            expected = bits_of(rounded(x, dtype, seed, step))
            for number in (1, 2):
                kernels.set_num_threads(number)
                found = bits_of(rounded_by_a_step(x, dtype, seed, step))
                np.testing.assert_array_equal(found, expected)
    finally:
        kernels.set_num_threads(threads)


def test_random_bits_do_not_depend_on_each_other() -> None:
    """Of seeds, steps, tensors and neighbours: half of all middles go up."""
    x = np.full(1_000_000, 1 + 2.0**-8, np.float32)  # between 1 and 1 + 2^-7

    def ups(seed: int, step: int, tensor: int) -> Array:
        return to_numpy(rounded(x, mx.bfloat16, seed, step, tensor)) > 1

    keys = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (2, 3, 9)]
    drawn = [ups(*key) for key in keys]
    pairs = [(a, b) for i, a in enumerate(drawn) for b in drawn[:i]]
    pairs += [(a[k:], a[:-k]) for a in drawn for k in (1, 2, 4, 64, 1024)]
    for a, b in pairs:
        deviation = 0.5 / np.sqrt(a.size)
        assert abs(np.mean(a == b) - 0.5) <= 4.5 * deviation
    for a in drawn:
        assert abs(np.mean(a) - 0.5) <= 4 * 0.5 / np.sqrt(a.size)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_resumed_run_draws_the_same_bits(
    backend: str, compiled: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(10)
    shapes = {"a": (40, 70), "b": (5,)}
    start = {k: rng.standard_normal(s).astype("f4") for k, s in shapes.items()}
    gradients = [
        {k: mx.array(rng.standard_normal(s).astype("f4")) for k, s in shapes.items()}
        for _ in range(4)
    ]

    def run(seed: int, resumes: bool, compiled: bool) -> Any:
        weights = {k: mx.array(x).astype(mx.bfloat16) for k, x in start.items()}
        optimizer = optim.Adam(1e-3, stochastic_rounding=True)
        optimizer.init(weights)
        optimizer.state["rounding_seed"] = mx.array(seed, mx.uint32)

        def step(gradients: Any, weights: Any) -> Any:
            return optimizer.apply_gradients(gradients, weights)

        if compiled:
            step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
        for i, gradient in enumerate(gradients):
            if resumes and i == 2:
                path = tmp_path / "checkpoint.safetensors"
                optim.save(path, weights, optimizer)
                weights = {k: mx.zeros_like(x) for k, x in weights.items()}
                optimizer = optim.Adam(1e-3, stochastic_rounding=True)
                optimizer.init(weights)
                optim.load(path, weights, optimizer)
            weights = step(gradient, weights)
        return snapshot([weights, optimizer.state])

    expected = run(5, resumes=False, compiled=False)
    assert run(5, resumes=True, compiled=False) == expected
    assert run(5, resumes=False, compiled=compiled) == expected
    assert run(6, resumes=False, compiled=False)["0.a"] != expected["0.a"]
