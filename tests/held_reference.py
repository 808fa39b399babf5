"""Codes, masters and random rounding in NumPy: what tests of storage compare with."""

from typing import Any, NamedTuple

import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import numpy.typing as npt
from mlx_fused_optimizers._kernels import kernels

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


class Kind(NamedTuple):
    """A kind of codes: how many share a scale, and the largest of each sign."""

    block: int
    most_signed: int
    most_positive: int


KINDS = {"int8": Kind(64, 127, 255), "int4": Kind(32, 7, 15)}
# A code is a root, rounded. metal/formats.h has sqrt(x) to 6.6e-4 of its value and
# x^(1/4) to 2.5e-4, the scale's 1 / sqrt(x) to 2e-5 and its x^(-1/4) to 5e-5; and there
# are float32's roundings.
ROOT_ERRORS = {False: 6.6e-4 + 2e-5 + 1e-6, True: 2.5e-4 + 5e-5 + 1e-6}


# What is added to the squares of the roots of codes of 4 bits before they are rounded.
ADDED = {False: -0.3, True: 0.5}


def most_of(kind: str, is_positive: bool) -> int:
    return KINDS[kind].most_positive if is_positive else KINDS[kind].most_signed


def in_blocks(x: Array, block: int) -> Array:
    """As rows of blocks, the last filled up with zeros."""
    flat = x.reshape(-1)
    return np.pad(flat, (0, -flat.size % block)).reshape(-1, block)


def whole_codes(codes: Array, kind: str, is_positive: bool, size: int) -> Array:
    """Codes as integers, one an element."""
    if kind == "int8":
        assert codes.dtype == (np.uint8 if is_positive else np.int8)
        return codes.reshape(-1).astype(np.int64)
    assert codes.dtype == np.uint8
    assert codes.shape == (-(-size // 2),)
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(-1).astype(np.int64)
    assert not nibbles[size:].any()  # what is past the end
    return nibbles[:size] if is_positive else ((nibbles ^ 8) - 8)[:size]


def block_scales(x: Floats, kind: str) -> Floats:
    largest: Floats = np.abs(in_blocks(x, KINDS[kind].block)).max(-1)
    return largest


def decoded(q: Array, scales: Floats, kind: str, is_positive: bool) -> Doubles:
    """The values of codes, in float64."""
    root = q / most_of(kind, is_positive)
    scale = np.repeat(scales.astype(np.float64), KINDS[kind].block)[: q.size]
    value: Doubles = scale * (root**4 if is_positive else root * np.abs(root))
    return value


def exact_roots(x: Floats, kind: str, is_positive: bool) -> Doubles:
    """The roots in units of codes, in float64."""
    blocks = in_blocks(x.astype(np.float64), KINDS[kind].block)
    scales = np.abs(blocks).max(-1, keepdims=True)
    shares = np.abs(blocks) / np.where(scales > 0, scales, 1)
    roots: Doubles = shares ** (0.25 if is_positive else 0.5)
    return roots.reshape(-1)[: x.size] * most_of(kind, is_positive)


def rounded_roots(x: Floats, kind: str, is_positive: bool) -> Doubles:
    """What is rounded to the size of a code, in float64."""
    roots = exact_roots(x, kind, is_positive)
    if kind == "int4":
        squares = np.maximum(roots**2 + ADDED[is_positive], 0)
        roots = np.where(roots > 0, np.sqrt(squares), 0)
    return roots


def error_bound(x: Floats, kind: str, is_positive: bool) -> Doubles:
    """The most that decode(encode(x)) may differ from x.

    The root of q codes is off by q times ROOT_ERRORS, and rounding it by half a code,
    or by a whole one where 0 may not be; what 4 bits add to the roots comes on top.
    """
    roots = exact_roots(x, kind, is_positive)
    most = most_of(kind, is_positive)
    half = np.where((roots < 0.5) & is_positive, 1.0, 0.5)
    half = half + np.abs(roots - rounded_roots(x, kind, is_positive))
    power = 4 if is_positive else 2
    upper = (roots + half + roots * ROOT_ERRORS[is_positive]) / most
    scale = np.repeat(block_scales(x, kind).astype(np.float64), KINDS[kind].block)
    # The power is convex, so the way up is the longer one. 1e-6: decode's roundings.
    bound: Doubles = scale[: x.size] * (upper**power - (roots / most) ** power + 1e-6)
    return bound


def encoded(x: Floats, kind: str, is_positive: bool) -> tuple[Array, Array]:
    """Codes and scales by plain operations."""
    codes, scales = kernels.encode(mx.array(x), kind, is_positive)
    return np.array(codes), np.array(scales)


def encoded_by_a_step(x: Floats, kind: str, is_positive: bool) -> tuple[Array, Array]:
    """Codes and scales by the kernel: Adamax without averages holds g and |g|."""
    optimizer = optim.Adamax(
        1.0, betas=[0.0, 0.0], state_dtype=kind, quantize_filter=everything
    )
    optimizer.apply_gradients({"w": mx.array(x)}, {"w": mx.zeros(x.shape)})
    state = optimizer.state["w"]
    key = "v" if is_positive else "m"
    return np.array(state[f"{key}_{kind}"]), np.array(state[f"{key}_scales"])


def everything(path: str, array: mx.array) -> bool:
    return True


def as_float32(bits: Array) -> Floats:
    floats: Floats = np.ascontiguousarray(bits, np.uint32).view(np.float32)
    return floats


def bits_of(x: mx.array) -> Array:
    """The bits of an array of any float dtype."""
    return np.array(mx.view(x, mx.uint32 if x.dtype.size == 4 else mx.uint16))


def weights_of_a_step(x: Floats, dtype: mx.Dtype, **options: Any) -> tuple[Any, Any]:
    """What a step makes of a weight whose new value is x, and the optimizer's state.

    From -0 with a gradient of -x, so that 0 keeps its sign too.
    """
    optimizer = optim.SGD(1.0, **options)
    weights = {"w": -mx.zeros(x.shape, dtype)}
    updated = optimizer.apply_gradients({"w": mx.array(-x)}, weights)
    return updated["w"], optimizer.state


def assert_same_bits(found: mx.array, expected: mx.array) -> None:
    """Of NaN alone the place is compared: a sign or payload means nothing."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    places = [np.array(mx.isnan(x)) for x in (found, expected)]
    np.testing.assert_array_equal(places[0], places[1])
    pair = [
        np.where(p, 0, bits_of(x))
        for p, x in zip(places, (found, expected), strict=True)
    ]
    np.testing.assert_array_equal(pair[0], pair[1])


# What a step of an optimizer is to do


class Storage(NamedTuple):
    """How weights and states are held: a dtype of weights, and options."""

    name: str
    dtype: mx.Dtype
    options: dict[str, Any]


STORAGES = [
    Storage("int8", mx.float32, {"state_dtype": "int8"}),
    Storage("int4", mx.float32, {"state_dtype": "int4"}),
    Storage("24bit", mx.bfloat16, {"master_weights": "24bit"}),
    Storage("32bit", mx.float16, {"master_weights": "32bit"}),
    Storage("random", mx.bfloat16, {"stochastic_rounding": True}),
    Storage(
        "int8-24bit", mx.bfloat16, {"state_dtype": "int8", "master_weights": "24bit"}
    ),
    Storage(
        "int4-24bit", mx.float16, {"state_dtype": "int4", "master_weights": "24bit"}
    ),
    Storage(
        "int4-32bit", mx.bfloat16, {"state_dtype": "int4", "master_weights": "32bit"}
    ),
    Storage(
        "int8-random", mx.float16, {"state_dtype": "int8", "stochastic_rounding": True}
    ),
]


def storage_named(name: str) -> Storage:
    return next(storage for storage in STORAGES if storage.name == name)


def options_of(storage: Storage, **more: Any) -> dict[str, Any]:
    """The storage's options, with codes for tensors of any size if it has codes."""
    is_coded = "state_dtype" in storage.options
    filters = {"quantize_filter": everything} if is_coded else {}
    return {**storage.options, **filters, **more}


def kind_in(state: dict[str, Any], key: str) -> str | None:
    return next((kind for kind in KINDS if f"{key}_{kind}" in state), None)


def plain_state(state: dict[str, mx.array], shape: Any, rule: str) -> dict[str, Any]:
    """A parameter's state in float32, by NumPy's decoding; without its error."""
    plain = {}
    for key in kernels.states(rule):
        kind = kind_in(state, key)
        if kind is None:
            plain[key] = state[key].astype(mx.float32)
            continue
        is_positive = key in kernels.non_negative(rule)
        size = int(np.prod(shape))
        q = whole_codes(np.array(state[f"{key}_{kind}"]), kind, is_positive, size)
        scales = np.array(state[f"{key}_scales"])
        values = decoded(q, scales, kind, is_positive).astype(np.float32)
        plain[key] = mx.array(values.reshape(shape))
    return plain


def master_of(weight: mx.array, state: dict[str, mx.array]) -> mx.array:
    """The float32 that a weight and its error stand for."""
    if "error" not in state:
        return weight.astype(mx.float32)
    error = np.array(state["error"]).astype(np.int64)
    unit = 256 if state["error"].dtype == mx.int8 else 1
    if weight.dtype == mx.bfloat16:
        bits = (bits_of(weight).astype(np.int64) << 16) + error * unit
        return mx.array(as_float32(bits).reshape(weight.shape))
    wide = np.array(weight).astype(np.float64)
    least = np.maximum(np.abs(wide), 2.0**-14)
    binade = np.exp2(np.floor(np.log2(least)) - (26 if unit == 1 else 18))
    return mx.array((wide + error * binade).astype(np.float32))


def spacing(x: Doubles, dtype: mx.Dtype) -> Doubles:
    """The interval between the values of a dtype that x lies in."""
    digits, least = {
        mx.bfloat16: (7, -133),
        mx.float16: (10, -24),
        mx.float32: (23, -149),
    }[dtype]
    exponents = np.floor(np.log2(np.abs(x), where=x != 0, out=np.full(x.shape, -1e3)))
    spaces: Doubles = np.exp2(np.maximum(exponents - digits, least))
    return spaces


def stepper(optimizer: Any, compiled: bool) -> Any:
    def step(gradients: Any, parameters: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    if compiled:
        return mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    return step
