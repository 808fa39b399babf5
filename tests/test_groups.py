"""Groups of parameters against an optimizer for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from support import leaves_of

SHAPES = {"a": (12, 40), "b": (40,), "c": (3, 4, 5), "d": (), "e": (0, 3), "f": (64, 9)}


def trees(steps: int) -> list[dict[str, mx.array]]:
    rng = np.random.default_rng(0)
    return [
        {k: mx.array(rng.normal(size=x).astype(np.float32)) for k, x in SHAPES.items()}
        for _ in range(steps + 1)
    ]


def run(optimizer: Any, compiled: bool = False) -> dict[str, mx.array]:
    parameters, *gradients = trees(5)
    optimizer.init(parameters)
    step: Any = optimizer.apply_gradients
    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    for g in gradients:
        parameters = step(g, parameters)
        mx.eval(parameters, optimizer.state)
    return parameters


def takes(names: str) -> Callable[[str, mx.array], bool]:
    return lambda path, array: path in names


def schedule(step: mx.array) -> mx.array:
    return 0.01 / (1 + step.astype(mx.float32))


CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9}, {"learning_rate": 0.01}, {"momentum": 0.5}),
    ("AdamW", {}, {"learning_rate": schedule}, {"betas": (0.5, 0.6), "eps": 1e-3}),
    ("AdamW", {"bias_correction": True}, {"weight_decay": 0.5}, {"learning_rate": 0.0}),
    ("Lion", {}, {"learning_rate": 0.01, "weight_decay": 0.1}, {"betas": (0.5, 0.6)}),
    (
        "Adafactor",
        {"relative_step": False},
        {"learning_rate": 0.01},
        {"eps": (1e-8, 1)},
    ),
    ("Muon", {}, {"learning_rate": 0.01}, {"weight_decay": 0.3}),
    ("AdEMAMix", {"warmup": 9}, {"learning_rate": schedule}, {"weight_decay": 0.2}),
    ("Adan", {}, {"learning_rate": 0.01}, {"betas": (0.5, 0.6, 0.7)}),
    ("NAdam", {}, {"betas": (0.5, 0.6)}, {"momentum_decay": 0.5}),
    ("RAdam", {}, {"betas": (0.9, 0.99)}, {"learning_rate": schedule}),
    ("LAMB", {}, {"weight_decay": 0.3}, {"learning_rate": schedule}),
    ("AdamW", {"cautious": True}, {"weight_decay": 0.3}, {"betas": (0.5, 0.6)}),
    ("ScheduleFreeSGD", {}, {"learning_rate": 0.01}, {"momentum": 0.5}),
    ("ScheduleFreeAdamW", {}, {"betas": (0.5, 0.6)}, {"weight_decay": 0.2}),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("name", "options", "first", "second"),
    CASES,
    ids=[f"{case[0]}-{'-'.join((*case[2], *case[3]))}" for case in CASES],
)
def test_as_an_optimizer_for_each(
    backend: str,
    name: str,
    options: dict[str, Any],
    first: dict[str, Any],
    second: dict[str, Any],
    compiled: bool,
) -> None:
    kind = getattr(optim, name)
    usual = {"learning_rate": 0.1, **options}
    filters = [takes("af"), takes("bc")]
    grouped = kind(groups=[*zip(filters, (first, second), strict=True)], **usual)
    several = optim.MultiOptimizer(
        [kind(**{**usual, **first}), kind(**{**usual, **second}), kind(**usual)],
        filters,
    )
    ours, theirs = run(grouped, compiled), run(several, compiled)
    for key in SHAPES:
        assert mx.allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-6).item(), key


def test_with_other_options(backend: str) -> None:
    """A norm of all, decay of some, states in codes, and the last norm's factor."""
    options: dict[str, Any] = {
        "weight_decay": 0.1,
        "weight_decay_filter": takes("abf"),
        "state_dtype": "int8",
        "quantize_filter": takes("af"),
        "max_grad_norm": 1.0,
    }
    for last in (False, True):
        options["clip_by_last_norm"] = last
        groups = [(takes("ab"), {"learning_rate": 0.01, "weight_decay": 0.5})]
        ours = run(optim.AdamW(0.1, groups=groups, **options))
        limit = {k: options.pop(k) for k in ("max_grad_norm", "clip_by_last_norm")}
        several = optim.MultiOptimizer(
            [
                optim.AdamW(0.01, **{**options, "weight_decay": 0.5}),
                optim.AdamW(0.1, **options),
            ],
            [takes("ab")],
            **limit,
        )
        theirs = run(several)
        options |= limit
        for key in SHAPES:
            assert mx.allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-6).item(), key


def test_a_users_apply_single(backend: str) -> None:
    class Own(optim.AdamW):
        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
        ) -> mx.array:
            return super().apply_single(gradient, parameter, state)

    groups = [(takes("ab"), {"learning_rate": 0.01, "betas": (0.5, 0.6)})]
    own, usual = Own(0.1, groups=groups), optim.AdamW(0.1, groups=groups)
    ours, theirs = run(own), run(usual)
    for key in SHAPES:
        assert mx.allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-6).item(), key
    assert [*own.betas] == [0.9, 0.999]
    assert own.learning_rate.item() == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Muon"])
def test_groups_and_filters_are_asked_once_a_step(name: str) -> None:
    asked: list[str] = []

    def answers(what: str, answer: Any) -> Callable[..., Any]:
        def ask(*given: Any) -> Any:
            asked.append(what)
            return answer

        return ask

    rate = {"learning_rate": answers("schedule", 0.1)}
    optimizer = getattr(optim, name)(
        learning_rate=0.1,
        weight_decay=0.1,
        groups=[(answers("group", True), rate)],
        weight_decay_filter=answers("decay", True),
        **({"relative_step": False} if name == "Adafactor" else {}),
    )
    parameters, gradients = trees(1)
    optimizer.init(parameters)
    optimizer.apply_gradients(gradients, parameters)
    expected = [*["decay"] * len(SHAPES), *["group"] * len(SHAPES), "schedule"]
    assert sorted(asked) == expected


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Muon"])
def test_a_step_of_nothing(name: str) -> None:
    groups: Any = [(takes("a"), {"weight_decay": 0.3})]
    given = {} if name == "Adafactor" else {"learning_rate": 0.1}
    optimizer = getattr(optim, name)(**given, groups=groups)
    assert optimizer.apply_gradients({}, {}) == {}
    assert optimizer.step.item() == 1


def test_checkpoints_know_nothing_of_groups(tmp_path: Path) -> None:
    mx.set_default_device(mx.cpu)
    plain = stock.AdamW(0.1)
    parameters = run(plain)
    optim.save(tmp_path / "file", parameters, plain)
    grouped = optim.AdamW(0.1, groups=[(takes("a"), {"learning_rate": 0.01})])
    loaded = {key: mx.zeros_like(x) for key, x in parameters.items()}
    optim.load(tmp_path / "file", loaded, grouped)
    assert leaves_of(grouped.state).keys() == leaves_of(plain.state).keys()


def test_bad_groups() -> None:
    with pytest.raises(TypeError, match="groups is of type dict; expected a list"):
        optim.SGD(0.1, groups={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected pairs of a filter"):
        optim.SGD(0.1, groups=[({"learning_rate": 1.0},)])  # type: ignore[list-item]
    # What is of the whole optimizer would be ignored.
    with pytest.raises(ValueError, match=r"groups sets ns_steps; Muon has"):
        optim.Muon(0.1, groups=[(takes("a"), {"ns_steps": 1})])
    with pytest.raises(ValueError, match=r"groups sets betas; SGD has .*momentum"):
        optim.SGD(0.1, groups=[(takes("a"), {"betas": (0.1, 0.2)})])
    optimizer = optim.Adam(0.1, groups=[(takes("a"), {"bias_correction": True})])
    parameters = {"a": mx.ones(3)}
    with pytest.raises(ValueError, match="group 1 would need another kernel"):
        optimizer.apply_gradients({"a": mx.ones(3)}, parameters)
    assert optimizer.step.item() == 0
