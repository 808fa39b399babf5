"""optim.save and optim.load: exact, checked, all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from mlx_fused_optimizers import checkpoint
from support import every_optimizer, fill, oracle, snapshot, trees


class Network(nn.Module):  # type: ignore[misc, unused-ignore]
    """Layers in a list, a tree of plain arrays, mixed dtypes, a frozen layer."""

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        super().__init__()
        mx.random.seed(seed)
        self.layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)]
        self.extra: Any = {"scale": mx.random.normal(()), "parts": [mx.ones((2, 0))]}
        self.half = mx.random.normal((3,)).astype(mx.bfloat16)
        self.fixed = nn.Linear(2, 2)
        self.fixed.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        x = self.fixed(x) * self.extra["scale"] + self.extra["parts"][0].sum()
        return mx.square(x).mean() + mx.square(self.half).sum().astype(mx.float32)


def train(model: nn.Module, optimizer: stock.Optimizer, steps: int = 3) -> None:
    x = mx.array(np.random.default_rng(5).standard_normal((6, 4)), mx.float32)
    for _ in range(steps):
        _, gradients = nn.value_and_grad(model, lambda m: m(x))(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def everything(model: Any, optimizer: stock.Optimizer) -> dict[str, bytes]:
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    return snapshot({"model": parameters, "optimizer": optimizer.state})


def refused(path: Path, model: Any, optimizer: Any, **options: Any) -> str:
    """The error of a load, which must leave everything as it was."""
    before = everything(model, optimizer)
    state, step = optimizer.state, optimizer.state.get("step")
    with pytest.raises(ValueError) as caught:
        optim.load(path, model, optimizer, **options)
    assert everything(model, optimizer) == before
    assert optimizer.state.get("step") is step
    if not isinstance(optimizer, stock.MultiOptimizer):
        assert optimizer.state is state
    return str(caught.value)


# What is saved comes back


@pytest.mark.parametrize("library", [optim, oracle], ids=["ours", "stock"])
@every_optimizer
def test_a_resumed_run_ends_in_the_same_bits(
    backend: str, name: str, options: dict[str, Any], library: Any, tmp_path: Path
) -> None:
    def build(seed: int) -> tuple[Network, stock.Optimizer]:
        # Stock Adafactor and Muon may not return for arrays without elements.
        model = Network(seed)
        model.extra["parts"] = [mx.ones((2, 1))]
        schedule = library.linear_schedule(1e-2, 1e-3, 10)
        return model, getattr(library, name)(learning_rate=schedule, **options)

    path = tmp_path / "file"
    model, optimizer = build(0)
    train(model, optimizer)
    optim.save(path, model, optimizer)
    before = everything(model, optimizer)
    other, resumed = build(1)
    optim.load(path, other, resumed)
    assert everything(other, resumed) == before
    train(model, optimizer)
    train(other, resumed)
    assert everything(other, resumed) == everything(model, optimizer)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("saver", "loader"), [(optim, stock), (stock, optim)])
def test_either_library_loads_the_others(
    saver: Any, loader: Any, tmp_path: Path
) -> None:
    model, optimizer = Network(0), saver.AdamW(1e-2, weight_decay=0.1)
    train(model, optimizer)
    optim.save(tmp_path / "file", model, optimizer)
    other, resumed = Network(1), loader.AdamW(1e-3, weight_decay=0.1)
    optim.load(tmp_path / "file", other, resumed)
    assert everything(other, resumed) == everything(model, optimizer)


def mixed(library: Any = optim, eps: float = 1e-8) -> Any:
    inner = library.MultiOptimizer(
        [library.AdamW(1e-3, eps=eps), library.SGD(1e-2, momentum=0.9)],
        [lambda path, _: "layers.0" in path],
    )
    return library.MultiOptimizer(
        [library.Lion(1e-3), inner], [lambda _, array: array.ndim == 1]
    )


@pytest.mark.parametrize("library", [optim, oracle], ids=["ours", "stock"])
def test_nested_multi_optimizers(library: Any, tmp_path: Path) -> None:
    def build(seed: int) -> tuple[Network, stock.Optimizer]:
        model = Network(seed)
        del model.layers[1]  # stock cannot merge lists with such a gap
        return model, mixed(library)

    model, optimizer = build(0)
    train(model, optimizer)
    optim.save(tmp_path / "file", model, optimizer)
    other, resumed = build(1)
    train(other, resumed, 1)
    optim.load(tmp_path / "file", other, resumed)
    assert everything(other, resumed) == everything(model, optimizer)
    train(model, optimizer)
    train(other, resumed)
    assert everything(other, resumed) == everything(model, optimizer)

    error = refused(tmp_path / "file", other, mixed(library, eps=1e-6))
    assert re.findall(r"'(.*)': found", error) == ["optimizers.1.optimizers.0.eps"]
    lion = library.MultiOptimizer([library.Lion(1e-3)])
    error = refused(tmp_path / "file", other, lion)
    assert "state 'states.1.states.1.step': found uint64 ()" in error
    assert "'filters.1': found 'a function', expected nothing" in error


def test_options_and_their_state(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[Network, optim.Optimizer]:
        return Network(seed), optim.AdamW(
            1e-2,
            max_grad_norm=0.1,
            skip_nonfinite=True,
            state_dtype=mx.float32,
            weight_decay_filter=optim.decay_matrices_only,
        )

    model, optimizer = build(0)
    train(model, optimizer)
    optim.save(tmp_path / "file", model, optimizer)
    other, resumed = build(1)
    optim.load(tmp_path / "file", other, resumed)
    assert everything(other, resumed) == everything(model, optimizer)
    assert resumed.state["half"]["m"].dtype == mx.float32

    plain = optim.AdamW(1e-2)
    error = refused(tmp_path / "file", other, plain)
    assert "configuration 'max_grad_norm': found 0.1, expected nothing" in error
    assert "'state_dtype': found 'mlx.core.float32', expected nothing" in error
    assert "'weight_decay_filter': found 'a function'" in error
    assert "state 'half.m': found float32 (3,), expected bfloat16 (3,)" in error


def test_not_strict_keeps_the_optimizers_configuration(tmp_path: Path) -> None:
    model, optimizer = Network(0), optim.AdamW(1e-2, max_grad_norm=1.0)
    train(model, optimizer)
    optim.save(tmp_path / "file", model, optimizer)
    other, resumed = Network(1), optim.Adam(1e-2, eps=1e-6, skip_nonfinite=True)
    optim.load(tmp_path / "file", other, resumed, strict=False)
    assert resumed.eps == 1e-6 and resumed.max_grad_norm is None
    assert resumed.step.item() == 3
    expected = everything(model, optimizer)
    assert everything(other, resumed).items() - expected.items() == {
        ("optimizer.skipped_steps", snapshot({"x": mx.array(0, mx.uint64)})["x"])
    }
    error = refused(tmp_path / "file", other, optim.Lion(1e-2), strict=False)
    assert "state 'half.v': found bfloat16 (3,), expected nothing" in error
    assert "configuration" not in error


def test_before_the_first_step_and_partly_frozen(tmp_path: Path) -> None:
    model, optimizer = Network(0), optim.Adam(1e-2)
    optim.save(tmp_path / "new", model, optimizer)
    other, resumed = Network(1), optim.Adam(1e-3)
    train(other, resumed)
    optim.load(tmp_path / "new", other, resumed)
    assert everything(other, resumed) == everything(model, optimizer)
    assert resumed.learning_rate.item() == pytest.approx(1e-2)

    model.layers[0].freeze()
    train(model, optimizer)
    optim.save(tmp_path / "frozen", model, optimizer)
    assert "optimizer.layers.0.weight.m" not in mx.load(
        str(tmp_path / "frozen"), format="safetensors"
    )
    train(other, resumed)
    optim.load(tmp_path / "frozen", other, resumed)
    assert everything(other, resumed) == everything(model, optimizer)
    model.layers[0].unfreeze()
    optimizer.init(model.trainable_parameters())
    train(model, optimizer)
    train(other, resumed)
    assert everything(other, resumed) == everything(model, optimizer)


@settings(deadline=None)
@given(tree=trees(), seed=st.integers(0, 99))
def test_random_trees(
    tmp_path_factory: pytest.TempPathFactory, tree: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("random") / "file"
    parameters, gradients = fill(tree, rng, mx.float32), fill(tree, rng, mx.float32)
    optimizer, resumed = optim.AdamW(1e-2), optim.AdamW(1e-2)
    parameters = optimizer.apply_gradients(gradients, parameters)
    optim.save(path, parameters, optimizer)
    other = fill(tree, rng, mx.float32)
    optim.load(path, other, resumed)
    assert everything(other, resumed) == everything(parameters, optimizer)
    parameters = optimizer.apply_gradients(gradients, parameters)
    other = resumed.apply_gradients(gradients, other)
    assert everything(other, resumed) == everything(parameters, optimizer)


def test_state_that_was_cast_by_hand(tmp_path: Path) -> None:
    def cast(value: float) -> tuple[dict[str, mx.array], optim.Optimizer]:
        model, optimizer = target(value)
        optimizer.state["b"] = {"v": mx.array(value, mx.float32)}
        return model, optimizer

    path = tmp_path / "file"
    optim.save(path, *cast(1.0))
    other, resumed = cast(2.0)
    optim.load(path, other, resumed)
    assert everything(other, resumed) == everything(*cast(1.0))
    error = refused(path, *target(2.0))
    assert "state 'b.v': found float32 (), expected bfloat16 ()" in error


def test_plain_trees(tmp_path: Path) -> None:
    def tree(value: float) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        matrix = mx.array(rng.standard_normal((3, 5)) + value, mx.float32).T
        pair = (mx.array(value), [matrix, mx.zeros((0, 2))])
        return {"a": pair, "b": {"c": mx.array([value], mx.float16)}}

    def step(parameters: Any, optimizer: optim.Optimizer) -> Any:
        return optimizer.apply_gradients(tree_map(mx.ones_like, parameters), parameters)

    optimizer, resumed = optim.AdamW(1e-2), optim.AdamW(1e-2)
    parameters = step(tree(1.0), optimizer)
    optim.save(tmp_path / "file", parameters, optimizer)
    other = tree(2.0)
    holder, inner = other["a"][1], other["b"]
    optim.load(tmp_path / "file", other, resumed)
    assert everything(other, resumed) == everything(parameters, optimizer)
    assert other["a"][1] is holder and other["b"] is inner
    assert type(resumed.state["a"]) is tuple and type(resumed.state["a"][1]) is list
    parameters, other = step(parameters, optimizer), step(other, resumed)
    assert everything(other, resumed) == everything(parameters, optimizer)


def test_every_dtype(tmp_path: Path) -> None:
    dtypes = list(checkpoint.DTYPES.values())
    values = mx.array([[0, 1, 0], [1, 1, 0]])
    model = {str(dtype): values.astype(dtype, stream=mx.cpu) for dtype in dtypes}
    model["strided"] = mx.arange(12).reshape(3, 4).T[::-2]
    optim.save(tmp_path / "file", model, optim.SGD(1.0))
    other = tree_map(lambda x: mx.zeros(x.shape, x.dtype, stream=mx.cpu), model)
    optim.load(tmp_path / "file", other, optim.SGD(1.0))
    assert snapshot(other) == snapshot(model)


def test_mlx_reads_the_file(tmp_path: Path) -> None:
    model, optimizer = Network(), optim.AdamW(1e-2)
    train(model, optimizer)
    path = tmp_path / "file.safetensors"
    optim.save(path, model, optimizer)
    loaded: Any = mx.load(str(path), return_metadata=True)
    arrays, metadata = loaded
    assert snapshot(arrays) == everything(model, optimizer)
    assert json.loads(metadata["configuration"]) == {
        "class": "AdamW",
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "bias_correction": False,
        "max_grad_norm": None,
        "clip_by_last_norm": False,
        "skip_nonfinite": False,
        "accumulate": None,
        "accumulate_dtype": None,
        "ema": None,
        "state_dtype": None,
        "quantize_filter": None,
        "master_weights": None,
        "stochastic_rounding": False,
        "weight_decay_filter": None,
        "schedulers": {},
    }


def test_the_same_bytes_for_the_same_state(tmp_path: Path) -> None:
    model, optimizer = Network(), optim.AdamW(1e-2)
    train(model, optimizer)
    for name in ("one", "two"):
        optim.save(tmp_path / name, model, optimizer)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_compiled_step_goes_on_after_a_load(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[Network, optim.Optimizer, Callable[[], None]]:
        model, optimizer = Network(seed), optim.Adam(optim.cosine_decay(1e-2, 50))
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        x = mx.array(np.random.default_rng(5).standard_normal((6, 4)), mx.float32)

        @partial(mx.compile, inputs=state, outputs=state)
        def step() -> None:
            _, gradients = nn.value_and_grad(model, lambda m: m(x))(model)
            optimizer.update(model, gradients)

        return model, optimizer, step

    model, optimizer, step = build(0)
    for _ in range(3):
        step()
    optim.save(tmp_path / "file", model, optimizer)
    before = everything(model, optimizer)
    other, resumed, other_step = build(1)
    other_step()
    for i, (m, o, s) in enumerate(
        [(model, optimizer, step), (other, resumed, other_step)]
    ):
        for _ in range(i):
            s()
        optim.load(tmp_path / "file", m, o)
        assert everything(m, o) == before
        for _ in range(4):
            s()
    assert everything(other, resumed) == everything(model, optimizer)
    assert resumed.step.item() == 7


def test_a_users_own_optimizer(tmp_path: Path) -> None:
    class Average(optim.Optimizer):
        def __init__(self, rate: float, **options: Any) -> None:
            super().__init__(**options)
            self.rate = rate

        def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
            state["sums"] = [mx.zeros_like(parameter), mx.array(0)]

        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
        ) -> mx.array:
            total, count = state["sums"]
            state["sums"] = [total + gradient, count + 1]
            updated: mx.array = parameter - self.rate * total
            return updated

    model, optimizer = Network(0), Average(0.1)
    train(model, optimizer)
    optim.save(tmp_path / "file", model, optimizer)
    other, resumed = Network(1), Average(0.1)
    optim.load(tmp_path / "file", other, resumed)
    assert everything(other, resumed) == everything(model, optimizer)
    assert "'rate': found 0.1, expected 0.2" in refused(
        tmp_path / "file", other, Average(0.2)
    )


# What does not fit is named, and changes nothing


def test_every_mismatch_is_named(tmp_path: Path) -> None:
    model = {"w": mx.ones((2, 3)), "gone": mx.ones((1,)), "b": mx.ones((2,))}
    optimizer = optim.AdamW(optim.constant(1e-2), betas=(0.8, 0.9), eps=1e-6)
    optimizer.init(model)
    path = tmp_path / "file"
    optim.save(path, model, optimizer)
    other = {
        "w": mx.ones((3, 2)),
        "new": mx.ones(()),
        "b": mx.ones((2,), mx.float16),
    }
    error = refused(path, other, optim.Lion(1e-2, weight_decay=0.5))
    lines = error.splitlines()
    assert lines[0] == f"{path} does not fit:"
    assert [line.strip() for line in lines[1:]] == [
        "parameter 'w': found float32 (2, 3), expected float32 (3, 2)",
        "parameter 'new': found nothing, expected float32 ()",
        "parameter 'b': found float32 (2,), expected float16 (2,)",
        "parameter 'gone': found float32 (1,), expected nothing",
        "state 'w.m': found float32 (2, 3), expected float32 (3, 2)",
        "state 'w.v': found float32 (2, 3), expected nothing",
        "state 'b.m': found float32 (2,), expected float16 (2,)",
        "state 'b.v': found float32 (2,), expected nothing",
        "state 'gone.m': found float32 (1,), expected nothing",
        "state 'gone.v': found float32 (1,), expected nothing",
        "configuration 'class': found 'AdamW', expected 'Lion'",
        "configuration 'betas.0': found 0.8, expected 0.9",
        "configuration 'betas.1': found 0.9, expected 0.99",
        "configuration 'weight_decay': found 0.01, expected 0.5",
        "configuration 'eps': found 1e-06, expected nothing",
        "configuration 'schedulers.learning_rate': found 'a function', "
        "expected nothing",
    ]


def test_a_learning_rate_that_is_missing(tmp_path: Path) -> None:
    model = {"w": mx.ones((2, 3))}
    optim.save(tmp_path / "file", model, optim.Adafactor())
    error = refused(tmp_path / "file", model, optim.Adafactor(1e-2))
    assert "state 'learning_rate': found nothing, expected shape ()" in error


def test_whole_numbers_are_equal_as_ints_and_floats(tmp_path: Path) -> None:
    model = {"w": mx.ones((2, 3))}
    optim.save(tmp_path / "file", model, optim.SGD(1, weight_decay=0, momentum=1))
    optim.load(tmp_path / "file", model, optim.SGD(1.0, weight_decay=0.0, momentum=1.0))


def test_arguments_of_wrong_types(tmp_path: Path) -> None:
    path, sgd = tmp_path / "file", optim.SGD(0.1)
    bad: list[tuple[Any, Any, str]] = [
        ([mx.ones((2,))], sgd, "expected an mlx.nn.Module or a dict"),
        ({"w": 1.0}, sgd, "'w' is of type float; expected an mx.array"),
        ({"w": mx.ones((2,))}, {}, "expected an mlx.optimizers.Optimizer"),
    ]
    optim.save(path, {"w": mx.ones((2,))}, sgd)
    content = path.read_bytes()
    for model, optimizer, text in bad:
        for function in (optim.save, optim.load):
            with pytest.raises(TypeError, match=re.escape(text)):
                function(path, model, optimizer)
    sgd.state["note"] = "text"
    with pytest.raises(TypeError, match="'note' is of type str"):
        optim.save(path, {"w": mx.ones((2,))}, sgd)
    with pytest.raises(ValueError, match=r"two arrays have the path 'a\.b'"):
        twice = {"a": {"b": mx.ones(1)}, "a.b": mx.ones(1)}
        optim.save(path, twice, optim.SGD(0.1))
    assert path.read_bytes() == content


def test_the_state_of_another_model_is_not_saved(tmp_path: Path) -> None:
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.init({"inner": mx.ones((2,))})
    with pytest.raises(ValueError, match=r"'inner\.v': found float32 \(2,\), expected"):
        optim.save(tmp_path / "file", {"other": mx.ones((2,))}, optimizer)
    assert os.listdir(tmp_path) == []


# Damage


class Saved(NamedTuple):
    path: Path
    content: bytes
    start: int  # of the data


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    path = tmp_path / "file"
    model, optimizer = target(1.0)
    optim.save(path, model, optimizer)
    content = path.read_bytes()
    return Saved(path, content, 8 + int.from_bytes(content[:8], "little"))


def target(value: float) -> tuple[dict[str, mx.array], optim.Optimizer]:
    model = {"w": mx.full((2,), value), "b": mx.array(value, mx.bfloat16)}
    optimizer = optim.SGD(value, momentum=0.9)
    optimizer.init(model)
    mx.eval(model, optimizer.state)
    return model, optimizer


def assert_refused(saved: Saved, content: bytes, what: str) -> None:
    saved.path.write_bytes(content)
    model, optimizer = target(2.0)
    arrays = [x for _, x in [*tree_flatten(model), *tree_flatten(optimizer.state)]]
    with pytest.raises(ValueError, match=what):
        optim.load(saved.path, model, optimizer)
    after = [x for _, x in [*tree_flatten(model), *tree_flatten(optimizer.state)]]
    assert all(x is y for x, y in zip(arrays, after, strict=True))


def test_cut_at_every_byte(saved: Saved) -> None:
    for length in range(len(saved.content)):
        assert_refused(saved, saved.content[:length], "cut short|damaged")


def test_longer_by_a_byte(saved: Saved) -> None:
    assert_refused(
        saved, saved.content + b"\0", "too long: 33 bytes of data, expected 32"
    )


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_flipped_at_every_byte(saved: Saved, flip: int) -> None:
    for i in range(len(saved.content)):
        flipped = bytearray(saved.content)
        flipped[i] ^= flip
        what = "cut short|damaged" if i < saved.start else "data of .* is damaged"
        assert_refused(saved, bytes(flipped), what)


def forge(saved: Saved, change: Callable[[str], str]) -> bytes:
    """The file with another header, whose digest is right."""
    text = saved.content[8 : saved.start].decode()
    digest = json.loads(text)["__metadata__"]["header_sha256"]
    blank = change(text.replace(digest, "0" * 64)).encode()
    start = len(blank).to_bytes(8, "little")
    right = hashlib.sha256(start + blank).hexdigest().encode()
    return start + blank.replace(b"0" * 64, right) + saved.content[saved.start :]


FORGERIES = {
    "version": (r"checkpoint/1", "checkpoint/2", "version 2 of the format"),
    "dtype": (r'"F32"', '"F33"', "malformed"),
    "overlap": (r"\[0,8\]", "[0,4]", "malformed: 'model.w' lies at"),
    "gap": (r"\[8,10\]", "[9,11]", "malformed: 'model.b' lies at"),
    "shape": (r'"shape":\[2\]', '"shape":[-2]', "malformed: 'model.w' has the shape"),
    "boolean": (r'"shape":\[2\]', '"shape":[true]', "malformed"),
    "no list": (r'"shape":\[2\]', '"shape":2', "malformed"),
    "twice": (r'"model\.b"', '"model.w"', "malformed: a name occurs twice"),
    "name": (r'"model\.b"', '"other.b"', "malformed: 'other.b' is neither"),
    "json": (r"\}\s*$", "", "malformed"),
    "depth": (r'"shape":\[2\]', '"shape":' + "[" * 100000, "malformed"),
    "digest": (r'"data_sha256":"\w+"', '"data_sha256":1', "malformed"),
    "no digest": (r'"data_sha256":"\w+",', "", "malformed"),
    "configuration": (r'"configuration":"\{', '"configuration":"', "malformed"),
    "parameter": (r'"model\.b"', '"model.c"', "'b': found nothing, expected bfloat16"),
    "state": (r'"optimizer\.w\.v"', '"optimizer.w.m"', "'w.v': found nothing"),
    "step": (r'"optimizer\.step"', '"optimizer.stop"', "'stop': found uint64"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged(saved: Saved, kind: str) -> None:
    pattern, text, what = FORGERIES[kind]

    def change(header: str) -> str:
        changed, count = re.subn(pattern, lambda _: text, header, count=1)
        assert count == 1
        return changed

    assert forge(saved, lambda header: header) == saved.content
    assert_refused(saved, forge(saved, change), what)


def test_other_files(saved: Saved) -> None:
    mx.save_safetensors(str(saved.path) + ".safetensors", {"model.w": mx.ones(2)})
    other = Path(str(saved.path) + ".safetensors").read_bytes()
    assert_refused(saved, other, "no checkpoint of optim.save")
    assert_refused(saved, b"some text, longer than that", "no checkpoint")
    with pytest.raises(FileNotFoundError):
        optim.load(saved.path.with_name("missing"), *target(1.0))


# Writing: the old file or the new one, nothing between


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["os.fsync", "_write_to", "shutil.copymode"])
def test_an_error_leaves_the_old_file(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, error: BaseException, function: str
) -> None:
    write_to = checkpoint._write_to

    def fail(*arguments: Any) -> None:
        if function == "_write_to":  # after half of it
            write_to(*arguments)
            arguments[0].truncate(100)
        raise error

    monkeypatch.setattr(f"mlx_fused_optimizers.checkpoint.{function}", fail)
    with pytest.raises(type(error)):
        optim.save(saved.path, *target(3.0))
    assert os.listdir(saved.path.parent) == ["file"]
    assert saved.path.read_bytes() == saved.content


@pytest.mark.parametrize("when", range(1, 11))
def test_an_interrupt_in_a_load_leaves_everything(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    original = checkpoint._merge  # 10 calls: two trees, 2 + 6 entries
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt
        return original(*arguments)

    model, optimizer = target(2.0)
    before = everything(model, optimizer)
    monkeypatch.setattr(checkpoint, "_merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optim.load(saved.path, model, optimizer)
    assert everything(model, optimizer) == before
    optim.load(saved.path, model, optimizer)
    assert everything(model, optimizer) == everything(*target(1.0))


def test_permissions_and_links(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    mask = os.umask(0o027)
    try:
        optim.save(path, *target(1.0))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o600)
    link.symlink_to(path)
    optim.save(link, *target(2.0))
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600
    model, optimizer = target(1.0)
    optim.load(str(link), model, optimizer)
    assert everything(model, optimizer) == everything(*target(2.0))
    for folder in (tmp_path, Path(os.devnull)):
        with pytest.raises(OSError, match="not a regular file"):
            optim.save(folder, *target(1.0))
    with pytest.raises(FileNotFoundError, match="missing is not a directory"):
        optim.save(tmp_path / "missing" / "file", *target(1.0))
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
