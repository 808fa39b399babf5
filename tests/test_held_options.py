"""Codes, masters and random rounding together with everything else there is."""

import copy
import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from held_reference import (
    KINDS,
    STORAGES,
    Storage,
    error_bound,
    everything,
    options_of,
    plain_state,
    stepper,
    storage_named,
)
from mlx.utils import tree_flatten
from mlx_fused_optimizers._kernels import kernels
from support import (
    copy_tree,
    fill,
    leaves_of,
    oracle,
    random_array,
    snapshot,
    to_numpy,
)

FEW = [storage_named(x) for x in ("int8", "int8-24bit", "int4-32bit", "int8-random")]
few_storages = pytest.mark.parametrize("storage", FEW, ids=lambda x: x.name)


class Doubling(optim.AdamW):
    """A user's class that knows nothing of storage: it doubles every gradient."""

    def apply_single(self, gradient: Any, parameter: Any, state: Any) -> Any:
        assert state["m"].shape == parameter.shape
        return super().apply_single(2 * gradient, parameter, state)


def model(rng: np.random.Generator, dtype: mx.Dtype) -> Any:
    return {
        "embed": random_array(rng, (9, 70), dtype),
        "layers": [
            {
                "weight": random_array(rng, (16, 40), dtype),
                "bias": random_array(rng, (16,), dtype),
            }
            for _ in range(2)
        ],
        "scale": random_array(rng, (), dtype),
    }


def run(optimizer: Any, weights: Any, steps: list[Any]) -> Any:
    """What an optimizer makes of copies of weights: those, and a snapshot of all."""
    weights = copy_tree(weights)
    for gradients in steps:
        weights = optimizer.apply_gradients(gradients, weights)
    return weights, snapshot([weights, optimizer.state])


def beginning(storage: Storage, count: int = 3) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    weights = model(rng, storage.dtype)
    return weights, [fill(weights, rng, storage.dtype) for _ in range(count)]


@few_storages
# MLX compiles plain operations, as of a user's class, with the machine's compiler.
@pytest.mark.parametrize(
    ("make", "compiled", "bad"),
    [
        (optim.AdamW, False, np.nan),
        (optim.AdamW, True, -np.inf),
        (Doubling, False, np.nan),
    ],
)
def test_a_skipped_step_changes_no_bit(
    backend: str, storage: Storage, make: Any, compiled: bool, bad: float
) -> None:
    weights, steps = beginning(storage, count=2)
    optimizer = make(
        0.1,
        skip_nonfinite=True,
        max_grad_norm=1.0,
        weight_decay_filter=optim.decay_matrices_only,
        **options_of(storage),
    )
    optimizer.init(weights)
    step = stepper(optimizer, compiled)
    for gradients in steps:
        weights = step(gradients, weights)
        mx.eval(weights, optimizer.state)
        before = snapshot([weights, optimizer.state])
        spoiled = copy_tree(gradients)
        spoiled["layers"][1]["bias"][3] = bad
        weights = step(spoiled, weights)
        after = snapshot([weights, optimizer.state])
        changed = {path for path in after if after[path] != before[path]}
        assert changed == {"1.grad_norm", "1.skipped_steps"}
    assert int(optimizer.skipped_steps) == 2
    assert int(optimizer.step) == 2


@few_storages
def test_clipping_is_a_step_with_clipped_gradients(
    backend: str, storage: Storage
) -> None:
    weights, _ = beginning(storage)
    rng = np.random.default_rng(1)
    steps = [fill(weights, rng, mx.float32) for _ in range(2)]
    clipped = [optim.clip_grad_norm(gradients, 0.5)[0] for gradients in steps]
    clipping = optim.AdamW(0.1, max_grad_norm=0.5, **options_of(storage))
    _, found = run(clipping, weights, steps)
    _, expected = run(optim.AdamW(0.1, **options_of(storage)), weights, clipped)
    assert float(clipping.grad_norm or 0) > 0.5
    assert {k: x for k, x in found.items() if k != "1.grad_norm"} == expected


@few_storages
def test_weight_decay_filter(backend: str, storage: Storage) -> None:
    weights, steps = beginning(storage)
    kwargs = options_of(storage)
    filtered = optim.AdamW(
        0.1,
        weight_decay=0.5,
        weight_decay_filter=optim.decay_matrices_only,
        **kwargs,
    )
    _, found = run(filtered, weights, steps)
    _, decayed = run(optim.AdamW(0.1, weight_decay=0.5, **kwargs), weights, steps)
    _, kept = run(optim.AdamW(0.1, weight_decay=0.0, **kwargs), weights, steps)
    for path in leaves_of(weights):
        like = decayed if path.endswith("weight") else kept
        assert found[f"0.{path}"] == like[f"0.{path}"]
        assert decayed[f"0.{path}"] != kept[f"0.{path}"]


@pytest.mark.parametrize("kind", KINDS)
def test_large_states_are_in_codes_by_default(backend: str, kind: str) -> None:
    shapes = {"large": (64, 64), "small": (4095,), "longer": (4097,)}
    weights = {k: mx.zeros(shape, mx.bfloat16) for k, shape in shapes.items()}
    optimizer = optim.AdamW(0.1, state_dtype=kind)
    optimizer.apply_gradients(
        fill(weights, np.random.default_rng(2), mx.bfloat16), weights
    )
    codes = {f"m_{kind}", "m_scales", f"v_{kind}", "v_scales"}
    assert optimizer.state["large"].keys() == codes
    assert optimizer.state["longer"].keys() == codes
    assert optimizer.state["small"].keys() == {"m", "v"}
    assert {x.dtype for x in optimizer.state["small"].values()} == {mx.float32}
    block = KINDS[kind].block
    for key, size in (("large", 4096), ("longer", 4097)):
        state = optimizer.state[key]
        if kind == "int8":
            dtypes = [state[f"{k}_int8"].dtype for k in "mv"]
            assert dtypes == [mx.int8, mx.uint8]
            assert state["m_int8"].shape == shapes[key]
        else:
            assert state["m_int4"].dtype == mx.uint8
            assert state["m_int4"].shape == (-(-size // 2),)
        assert state["m_scales"].shape == (-(-size // block),)
        assert state["m_scales"].dtype == mx.float32


def test_quantize_filter_decides(backend: str) -> None:
    asked = []

    def embeddings_only(path: str, array: mx.array) -> bool:
        asked.append((path, array.shape))
        return path == "embed"

    weights, steps = beginning(storage_named("int8"))
    optimizer = optim.AdamW(0.1, state_dtype="int8", quantize_filter=embeddings_only)
    run(optimizer, weights, steps)
    assert {*asked} == {(path, x.shape) for path, x in leaves_of(weights).items()}
    coded = {path for path in leaves_of(optimizer.state) if path.endswith("_int8")}
    assert coded == {"embed.m_int8", "embed.v_int8"}
    # What is in no codes is as without the option.
    _, plain = run(optim.AdamW(0.1), weights, steps)
    _, found = run(
        optim.AdamW(0.1, state_dtype="int8", quantize_filter=embeddings_only),
        weights,
        steps,
    )
    for path in leaves_of(weights):
        assert (found[f"0.{path}"] == plain[f"0.{path}"]) == (path != "embed")


def test_groups_have_storages_of_their_own(backend: str) -> None:
    """The parts of a MultiOptimizer do what they do alone."""
    rng = np.random.default_rng(3)
    shapes = {"a": (24, 50), "b": (30,), "c": (8, 8)}
    weights = {k: random_array(rng, s, mx.bfloat16) for k, s in shapes.items()}
    steps = [fill(weights, rng, mx.bfloat16) for _ in range(3)]

    def parts() -> list[Any]:
        return [
            optim.Lion(0.1, **options_of(storage_named("int8-24bit"))),
            optim.AdamW(0.1, **options_of(storage_named("int4-32bit"))),
        ]

    def is_matrix(path: str, array: mx.array) -> bool:
        return array.ndim == 2

    whole = optim.MultiOptimizer(parts(), [is_matrix], skip_nonfinite=True)
    updated, _ = run(whole, weights, steps)
    for optimizer, names, i in zip(parts(), ("ac", "b"), (0, 1), strict=True):
        own = [{k: gradients[k] for k in names} for gradients in steps]
        expected, _ = run(optimizer, {k: weights[k] for k in names}, own)
        assert snapshot({k: updated[k] for k in names}) == snapshot(expected)
        assert snapshot(whole.state["states"][i]) == snapshot(optimizer.state)
    before = snapshot([updated, whole.state["states"]])
    spoiled = {**steps[0], "b": mx.full((30,), float("nan"), mx.bfloat16)}
    updated = whole.apply_gradients(spoiled, updated)
    assert snapshot([updated, whole.state["states"]]) == before


@pytest.mark.parametrize("storage", FEW[:3], ids=lambda x: x.name)
def test_a_subclass_of_a_user_sees_float32(backend: str, storage: Storage) -> None:
    """And its step is that of the class with the gradients that it passes on."""
    weights, steps = beginning(storage)
    doubled = [
        fill(gradients, np.random.default_rng(4 + i), storage.dtype)
        for i, gradients in enumerate(steps)
    ]
    twice = [copy_tree(x) for x in doubled]
    for gradients in twice:
        for layer in (gradients, *gradients["layers"]):
            for key, x in layer.items():
                if isinstance(x, mx.array):
                    layer[key] = 2 * x  # exact
    _, found = run(Doubling(0.1, **options_of(storage)), weights, doubled)
    _, expected = run(optim.AdamW(0.1, **options_of(storage)), weights, twice)
    assert found == expected


def test_a_subclass_of_a_user_with_random_rounding(backend: str) -> None:
    storage = storage_named("int8-random")
    weights, steps = beginning(storage, count=1)
    (gradients,) = steps
    updated, _ = run(Doubling(0.1, **options_of(storage)), weights, steps)
    wide = {k: x.astype(mx.float32) for k, x in leaves_of(weights).items()}
    doubled = {k: 2 * x.astype(mx.float32) for k, x in leaves_of(gradients).items()}
    expected = oracle.AdamW(0.1).apply_gradients(doubled, wide)
    for path, x in leaves_of(updated).items():
        assert x.dtype == storage.dtype
        exact = to_numpy(expected[path])
        np.testing.assert_allclose(to_numpy(x), exact, rtol=2.0**-10, atol=2e-6)


@few_storages
def test_copies_go_on_alike(backend: str, storage: Storage) -> None:
    weights, steps = beginning(storage)
    optimizer = optim.AdamW(0.1, max_grad_norm=1.0, **options_of(storage))
    weights, _ = run(optimizer, weights, steps)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    _, expected = run(optimizer, weights, steps)
    for other in copies:
        assert run(other, weights, steps)[1] == expected


@few_storages
def test_checkpoints(backend: str, storage: Storage, tmp_path: Path) -> None:
    """A run goes on from one with the same bits; a flipped byte is refused."""
    path = tmp_path / "checkpoint.safetensors"
    weights, steps = beginning(storage)
    optimizer = optim.AdamW(0.1, skip_nonfinite=True, **options_of(storage))
    weights, _ = run(optimizer, weights, steps)
    optim.save(path, weights, optimizer)
    saved: Any = mx.load(str(path))
    for name, x in leaves_of(optimizer.state).items():
        assert snapshot({"x": saved[f"optimizer.{name}"]}) == snapshot({"x": x})

    resumed = optim.AdamW(0.1, skip_nonfinite=True, **options_of(storage))
    others, _ = run(resumed, beginning(storage)[0], steps[:1])
    data = path.read_bytes()
    before = snapshot([others, resumed.state])
    broken = tmp_path / "broken.safetensors"
    rng = np.random.default_rng(5)
    # Of the end of the file, where arrays are, and anywhere.
    places = [len(data) - 1, *rng.integers(0, len(data), 30).tolist()]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        broken.write_bytes(bytes(flipped))
        with pytest.raises(ValueError):
            optim.load(broken, others, resumed)
        assert snapshot([others, resumed.state]) == before

    optim.load(path, others, resumed)
    assert snapshot([others, resumed.state]) == snapshot([weights, optimizer.state])
    assert run(resumed, others, steps)[1] == run(optimizer, weights, steps)[1]


# Changes in mid-run


@pytest.mark.parametrize("others", [("int4", None), (None, "int8"), ("int4", "int8")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_state_dtype_may_change(
    backend: str, others: tuple[Any, Any], dtype: mx.Dtype
) -> None:
    """The state is brought from one form into another, and is as exact as that.

    The weights keep their dtype: a state that is in codes no more takes it.
    """
    rng = np.random.default_rng(0)
    weights = model(rng, dtype)
    steps = [fill(weights, rng, dtype) for _ in range(3)]
    optimizer = optim.AdamW(0.1, state_dtype="int8", quantize_filter=everything)
    weights, _ = run(optimizer, weights, steps)
    shapes = {path: x.shape for path, x in leaves_of(weights).items()}
    for kind in others:
        before = {
            path: plain_state(state_at(optimizer, path), shape, "Adam")
            for path, shape in shapes.items()
        }
        optimizer.state_dtype = kind
        optimizer.init(weights)
        for path, shape in shapes.items():
            state = state_at(optimizer, path)
            names = {"m", "v"} if kind is None else {f"m_{kind}", f"v_{kind}"}
            assert {name for name in state if "scales" not in name} == names
            after = plain_state(state, shape, "Adam")
            for key, is_positive in (("m", False), ("v", True)):
                x = np.array(before[path][key]).reshape(-1)
                error = np.abs(np.array(after[key]).reshape(-1) - x)
                if kind is None:
                    digits = 1e-6 if dtype == mx.float32 else 2.0**-8
                    assert np.all(error <= digits * np.abs(x) + 1e-12)
                else:
                    assert np.all(error <= error_bound(x, kind, is_positive))
        weights = optimizer.apply_gradients(steps[0], weights)
        for weight in leaves_of(weights).values():
            assert weight.dtype == dtype
            assert mx.all(mx.isfinite(weight))


def state_at(optimizer: Any, path: str) -> Any:
    node = optimizer.state
    for key in path.split("."):
        node = node[int(key) if isinstance(node, list) else key]
    return node


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_master_weights_may_change(backend: str, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(6)
    weights = {"w": random_array(rng, (30, 40), dtype)}
    optimizer = optim.SGD(1e-3, momentum=0.9)
    forms: list[tuple[str | None, Any]] = [
        (None, None),
        ("24bit", mx.int8),
        ("32bit", mx.int16),
        ("24bit", mx.int8),
        (None, None),
    ]
    master = weights["w"].astype(mx.float32)
    for kind, error_dtype in forms:
        optimizer.master_weights = kind
        optimizer.init(weights)
        state = optimizer.state["w"]
        assert getattr(state.get("error"), "dtype", None) == error_dtype
        before = master
        if kind is not None:
            master = kernels.join(weights["w"], state["error"])
            unit = 2.0**-8 if kind == "24bit" else 0.0
            limit = np.abs(np.array(before)) * 2.0**-7 * unit + 1e-12
            assert np.all(np.abs(np.array(master - before)) <= limit)
        weights = optimizer.apply_gradients(fill(weights, rng, dtype), weights)
        error = optimizer.state["w"].get("error")
        master = weights["w"].astype(mx.float32)
        if error is not None:
            master = kernels.join(weights["w"], error)
        assert weights["w"].dtype == dtype


@few_storages
def test_init_again_when_the_model_has_changed(backend: str, storage: Storage) -> None:
    weights, steps = beginning(storage)
    optimizer = optim.AdamW(0.1, **options_of(storage))
    weights, _ = run(optimizer, weights, steps)
    kept = snapshot(optimizer.state["layers"])
    weights["embed"] = mx.zeros((5, 90), storage.dtype)
    weights["new"] = mx.zeros((65,), storage.dtype)
    del weights["scale"]
    optimizer.init(weights)
    assert snapshot(optimizer.state["layers"]) == kept
    assert "scale" not in optimizer.state
    fresh = optim.AdamW(0.1, **options_of(storage))
    fresh.init(weights)
    for key in ("embed", "new"):
        assert snapshot(optimizer.state[key]) == snapshot(fresh.state[key])
    gradients = fill(weights, np.random.default_rng(7), storage.dtype)
    updated = optimizer.apply_gradients(gradients, weights)
    assert updated["embed"].shape == (5, 90)


@few_storages
def test_frozen_parameters_have_no_state(backend: str, storage: Storage) -> None:
    mx.random.seed(0)
    network = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3))
    network.set_dtype(storage.dtype)
    network.layers[0].freeze()
    optimizer = optim.AdamW(0.01, **options_of(storage))
    x = random_array(np.random.default_rng(8), (16, 8), storage.dtype)

    def loss(network: Any) -> mx.array:
        return mx.square(network(x)).mean()

    frozen = snapshot(network.layers[0].parameters())
    value_and_grad = nn.value_and_grad(network, loss)
    losses = []
    for number in range(8):
        if number == 4:
            assert not any("layers.0" in path for path in leaves_of(optimizer.state))
            assert snapshot(network.layers[0].parameters()) == frozen
            network.unfreeze()
            optimizer.init(network.trainable_parameters())
        value, gradients = value_and_grad(network)
        losses.append(value.item())
        optimizer.update(network, gradients)
        mx.eval(network.parameters(), optimizer.state)
    assert snapshot(network.layers[0].parameters()) != frozen
    assert any("layers.0.weight" in path for path in leaves_of(optimizer.state))
    assert losses[-1] < losses[3] < losses[0]


# Transforms


@few_storages
def test_gradients_through_a_step(backend: str, storage: Storage) -> None:
    """Those of the float32 step from the same values: rounding has no share."""
    rng = np.random.default_rng(9)
    w = random_array(rng, (50,), storage.dtype)
    g = random_array(rng, (50,), storage.dtype)
    cosines = random_array(rng, (50,), mx.float32)
    optimizer = optim.SGD(0.1, momentum=0.9, weight_decay=0.2, **options_of(storage))
    weights = optimizer.apply_gradients({"w": g}, {"w": w})
    start = copy_tree(optimizer.state)
    plain = oracle.SGD(0.1, momentum=0.9, weight_decay=0.2)
    master = weights["w"].astype(mx.float32)
    moment = plain_state(start["w"], (50,), "Momentum")

    def ours(w: mx.array, g: mx.array) -> Any:
        optimizer.state.update(start, w=dict(start["w"]))
        updated = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
        return (cosines * updated.astype(mx.float32)).sum()

    def theirs(w: mx.array, g: mx.array) -> Any:
        plain.init({"w": w})
        plain.state["w"] = dict(moment)
        plain.state["step"] = mx.array(1, mx.uint64)
        return (cosines * plain.apply_gradients({"w": g}, {"w": w})["w"]).sum()

    found = mx.grad(ours, argnums=(0, 1))(weights["w"], g)
    expected = mx.grad(theirs, argnums=(0, 1))(master, g.astype(mx.float32))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == storage.dtype
        assert float(mx.abs(y).max()) > 0.01
        np.testing.assert_allclose(to_numpy(x), to_numpy(y), rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda x: x.name)
def test_vmap_over_a_step(backend: str, storage: Storage) -> None:
    rng = np.random.default_rng(10)
    w = random_array(rng, (4, 3, 33), storage.dtype)
    g = random_array(rng, (4, 3, 33), storage.dtype)

    def step(w: mx.array, g: mx.array) -> Any:
        optimizer = optim.AdamW(0.1, **options_of(storage))
        w = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
        w = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
        return {"w": w, **optimizer.state["w"]}

    found = mx.vmap(step)(w, g)
    for i in range(4):
        expected = step(w[i], g[i])
        assert snapshot({k: x[i] for k, x in found.items()}) == snapshot(expected)


# Bad input

REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("AdamW", {"state_dtype": "int2"}, ValueError, 'should be float32.*"int4", .int2.'),
    ("AdamW", {"state_dtype": mx.int8}, ValueError, "state_dtype should be float32"),
    ("AdamW", {"state_dtype": 8}, TypeError, "state_dtype is of type int"),
    ("Muon", {"master_weights": "16bit"}, ValueError, "should be '24bit' or '32bit'"),
    ("Lion", {"master_weights": 24}, TypeError, "master_weights is of type int"),
    (
        "AdamW",
        {"master_weights": "24bit", "stochastic_rounding": True},
        ValueError,
        "exclude each other",
    ),
    ("Adafactor", {"state_dtype": "int8"}, ValueError, "no states in codes"),
    (
        "AdamW",
        {"state_dtype": "int8", "quantize_filter": "weight"},
        TypeError,
        "quantize_filter is of type str",
    ),
]


@pytest.mark.parametrize(("name", "options", "error", "text"), REFUSED)
def test_options_that_are_refused(
    name: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """By the constructor, and when they are set on a running optimizer."""
    make = getattr(optim, name)
    with pytest.raises(error, match=text):
        make(**options) if name == "Adafactor" else make(0.1, **options)
    optimizer = make(0.1) if name != "Adafactor" else make()
    weights, steps = beginning(storage_named("24bit"))
    weights, before = run(optimizer, weights, steps)
    attributes = {key: getattr(optimizer, key) for key in options}
    *first, last = options.items()
    for key, value in first:
        setattr(optimizer, key, value)
        attributes[key] = value
    with pytest.raises(error, match=text):
        setattr(optimizer, *last)
    assert {key: getattr(optimizer, key) for key in options} == attributes
    assert snapshot([weights, optimizer.state]) == before


@pytest.mark.parametrize("name", ["state_dtype", "master_weights", "quantize_filter"])
def test_plain_optimizers_take_no_storage(name: str) -> None:
    options: Any = {name: None}
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        optim.MultiOptimizer([optim.SGD(0.1)], [], **options)


def test_a_filter_without_effect_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="quantize_filter has no effect without"):
        optim.AdamW(0.1, quantize_filter=everything)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("int8", "m_int8"),
        ("int8", "m_scales"),
        ("int8-24bit", "v_scales"),
        ("int8-24bit", "error"),
        ("int4-32bit", "m_int4"),
        ("int4-32bit", "error"),
        ("int8-random", "v_int8"),
        *[(storage.name, "gradient") for storage in FEW],
        *[(storage.name, "filter") for storage in FEW],
    ],
)
def test_an_error_in_a_step_changes_nothing(
    backend: str, name: str, entry: str
) -> None:
    storage = storage_named(name)
    weights, steps = beginning(storage)
    optimizer = optim.AdamW(0.1, **options_of(storage))
    weights, _ = run(optimizer, weights, steps)
    gradients = copy_tree(steps[0])
    state = optimizer.state["layers"][0]["weight"]
    error: Any = ValueError
    if entry == "gradient":
        gradients["layers"][0]["weight"] = mx.zeros((3, 3), storage.dtype)
    elif entry == "filter":
        optimizer.quantize_filter = fails
        error = ZeroDivisionError
    else:
        state[entry] = state[entry].reshape(-1)[:-1]
    before = snapshot([weights, optimizer.state])
    with pytest.raises(error, match=None if entry == "filter" else "weight|_|error"):
        optimizer.apply_gradients(gradients, weights)
    assert snapshot([weights, optimizer.state]) == before


def fails(path: str, array: mx.array) -> bool:
    raise ZeroDivisionError


# Convergence


def digits_like(rng: np.random.Generator) -> tuple[mx.array, mx.array]:
    """Ten classes of images of 64 grey values, noisy, a tenth of the labels wrong."""
    centres = rng.uniform(0, 1, (10, 64))
    labels = rng.integers(0, 10, 1500)
    images = centres[labels] + 0.45 * rng.standard_normal((1500, 64))
    wrong = rng.random(1500) < 0.1
    labels[wrong] = rng.integers(0, 10, wrong.sum())
    return mx.array(images.astype(np.float32)), mx.array(labels)


def losses_and_updates(
    dtype: mx.Dtype, steps: int, **options: Any
) -> tuple[float, float]:
    """The mean loss of the last fifth, and the largest update in learning rates."""
    images, labels = digits_like(np.random.default_rng(0))
    mx.random.seed(0)
    network = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    mx.eval(network.parameters())
    network.set_dtype(dtype)
    rate = 2e-3
    optimizer = optim.AdamW(rate, weight_decay=0.0, bias_correction=True, **options)
    optimizer.init(network.trainable_parameters())

    def loss(network: Any, x: mx.array, y: mx.array) -> mx.array:
        logits = network(x.astype(dtype)).astype(mx.float32)
        return nn.losses.cross_entropy(logits, y).mean()

    value_and_grad = nn.value_and_grad(network, loss)
    order = np.random.default_rng(1)
    losses, largest = [], 0.0
    for number in range(steps):
        batch = mx.array(order.integers(0, 1500, 64))
        value, gradients = value_and_grad(network, images[batch], labels[batch])
        losses.append(value)
        before = masters(network, optimizer)
        optimizer.update(network, gradients)
        mx.eval(network.parameters(), optimizer.state, losses[-1])
        if number > 0:
            moved = zip(masters(network, optimizer), before, strict=True)
            changes = [mx.abs(a - b).max() for a, b in moved]
            largest = max(largest, float(mx.max(mx.stack(changes))))
    last = losses[-steps // 5 :]
    return float(mx.mean(mx.stack(last))), largest / rate


def masters(network: Any, optimizer: Any) -> list[mx.array]:
    flat: Any = tree_flatten(network.trainable_parameters())
    result = []
    for path, weight in flat:
        error = state_at(optimizer, path).get("error")
        wide = weight + 0.0 if error is None else kernels.join(weight, error)
        result.append(wide.astype(mx.float32))
    mx.eval(result)
    return result


def test_it_converges_as_in_float32() -> None:
    """Loss within 2 %, and no update beyond 4 times the largest of float32.

    The latter is what a v that rounds to 0 beside an m that does not would show.
    """
    mx.set_default_device(mx.cpu)
    loss, update = losses_and_updates(mx.float32, 400)
    assert loss < 1.2  # of log(10) = 2.3
    coded, largest = losses_and_updates(
        mx.bfloat16,
        400,
        state_dtype="int8",
        quantize_filter=everything,
        master_weights="24bit",
    )
    assert abs(coded - loss) <= 0.02 * loss
    assert largest <= 4 * update


def test_parts_of_a_multi_optimizer_round_by_bits_of_their_own() -> None:
    mx.set_default_device(mx.cpu)
    optimizers = [optim.SGD(1.0, stochastic_rounding=True) for _ in range(2)]
    multi = optim.MultiOptimizer(optimizers, [lambda path, array: path == "a"])
    zeros = {key: mx.zeros(4096, mx.bfloat16) for key in "ab"}
    middle = {key: mx.full(4096, -(1 + 2.0**-8), mx.float32) for key in "ab"}
    updated = multi.apply_gradients(middle, zeros)
    a, b = (np.array(updated[key].astype(mx.float32)) for key in "ab")
    assert 0.4 < np.mean(a == b) < 0.6
