"""docs/pytorch.md: each row of its tables beside torch's numbers."""

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import pytest
import torch_reference as reference

STORED: dict[str, Any] = json.loads(reference.STORED.read_text())
VALUES: dict[str, Any] = {**reference.VALUES, "optim": optim, "mx": mx}


def rows(section: str) -> Callable[..., Any]:
    found = reference.rows(section)
    names = [here for _, here in found]
    return pytest.mark.parametrize(("theirs", "here"), found, ids=names)


def assert_steps_match(
    optimizer: Any,
    expected: dict[str, Any],
    tolerance: float,
    state: dict[str, Any] | None = None,
) -> None:
    """Ten steps, and the largest difference in units of the largest change."""
    wanted = {key: x for key, x in expected.items() if key != "norm"}
    only_matrices = "vector" not in wanted
    start = reference.arrays(0, only_matrices)
    parameters: Any = {key: mx.array(x) for key, x in start.items()}
    optimizer.init(parameters)
    for key, entries in (state or {}).items():
        optimizer.state[key] |= entries
    for step in range(1, reference.STEPS + 1):
        gradients = reference.arrays(step, only_matrices)
        parameters = optimizer.apply_gradients(
            {key: mx.array(x) for key, x in gradients.items()}, parameters
        )
    assert parameters.keys() == wanted.keys()
    for key, x in parameters.items():
        theirs = np.array(wanted[key]).reshape(x.shape)
        largest = np.abs(theirs - start[key]).max()
        np.testing.assert_allclose(x, theirs, 0, tolerance * largest, err_msg=key)


@rows("Optimizers")
def test_optimizers(backend: str, theirs: str, here: str) -> None:
    assert_steps_match(eval(here, VALUES), STORED["steps"][theirs], 1e-5)


@rows("Muon")
def test_muon(backend: str, theirs: str, here: str) -> None:
    assert_steps_match(eval(here, VALUES), STORED["muon in float32"][theirs], 1e-4)
    assert_steps_match(eval(here, VALUES), STORED["muon"][theirs], 2e-2)


@rows("Schedules")
def test_schedules(theirs: str, here: str) -> None:
    schedule = eval(here, VALUES)
    found = [schedule(mx.array(step)).item() for step in range(reference.SCHEDULED)]
    np.testing.assert_allclose(found, STORED["schedules"][theirs], 1e-6, 1e-9)


@pytest.mark.parametrize("inside", [True, False], ids=["in the step", "before it"])
def test_clipping(backend: str, inside: bool) -> None:
    limit, expected = reference.MAX_NORM, STORED["clipped"]
    options: Any = {"max_grad_norm": limit} if inside else {}
    optimizer: Any = optim.AdamW(VALUES["lr"], bias_correction=True, **options)
    if inside:
        assert_steps_match(optimizer, expected, 1e-5)
        assert optimizer.grad_norm.item() == pytest.approx(expected["norm"], rel=1e-6)
        return
    step = optimizer.apply_gradients

    def clipped(gradients: Any, parameters: Any) -> Any:
        gradients, norm = optim.clip_grad_norm(gradients, limit)
        clipped.norm = norm.item()  # type: ignore[attr-defined]
        return step(gradients, parameters)

    optimizer.apply_gradients = clipped
    assert_steps_match(optimizer, expected, 1e-5)
    norm = clipped.norm  # type: ignore[attr-defined]
    assert norm == pytest.approx(expected["norm"], rel=1e-6)


@rows(reference.DIFFERENT)
def test_what_is_not_the_same(theirs: str, here: str) -> None:
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_steps_match(eval(here, VALUES), STORED["different"][theirs], 1e-5)


def test_dampening_differs_by_the_first_step_alone(backend: str) -> None:
    momentum, dampening = VALUES["momentum"], VALUES["decay"]
    (program,) = (x for x in STORED["different"] if "dampening" in x)
    # With a state of which the first step makes the gradient itself, as torch's.
    first = reference.arrays(1)
    state = {k: {"v": mx.array(x) * (dampening / momentum)} for k, x in first.items()}
    optimizer = optim.SGD(VALUES["lr"], momentum, dampening=dampening)
    assert_steps_match(optimizer, STORED["different"][program], 1e-5, state)


def test_the_numbers_are_torchs() -> None:
    pytest.importorskip("torch")
    found = reference.reference()
    assert found.keys() == STORED.keys()

    def compare(one: Any, other: Any) -> None:
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for key in one:
                compare(one[key], other[key])
        else:
            np.testing.assert_allclose(one, other, 1e-5, 1e-6)

    for part in found.keys() - {"torch", "muon"}:
        compare(found[part], STORED[part])


def test_every_program_of_the_page_has_numbers() -> None:
    for part, section in {
        "steps": "Optimizers",
        "muon": "Muon",
        "muon in float32": "Muon",
        "schedules": "Schedules",
        "different": reference.DIFFERENT,
    }.items():
        programs = [theirs for theirs, _ in reference.rows(section)]
        assert programs == [*STORED[part]], "run: python tests/torch_reference.py"
        assert len(programs) >= 5
