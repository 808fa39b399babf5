"""Parameters that are shards: several ranks against one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from distributed_ranks import CASES
from ranks import launch

RANKS = Path(__file__).with_name("distributed_ranks.py")
SECONDS = 120  # after which a rank is killed
pytestmark = pytest.mark.skipif(
    not hasattr(nn, "fully_shard"), reason="this MLX has no fully_shard"
)


def run(ranks: int, folder: Path, cases: list[str]) -> list[dict[str, Any]]:
    """The results of each rank."""
    return [x.result for x in launch(RANKS, ranks, folder, cases, SECONDS)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One process's results, and those of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    (alone,) = run(1, folder, [x for x in CASES if x not in ("muon", "adafactor")])
    yield alone, run(2, folder, [*CASES])


TRAINED = ["tensor", "compiled", "fully", "multi", "last"]


@pytest.mark.parametrize("case", TRAINED)
def test_ranks_train_as_one_process(results: Any, case: str) -> None:
    """Also with a part of the model replicated, of which each rank has the same."""
    alone, ranks = results
    for rank in ranks:
        assert rank[case]["norm"] == pytest.approx(alone[case]["norm"], rel=1e-4)
        assert rank[case]["steps"] == alone[case]["steps"] == 20
        assert rank[case]["parameters"].keys() == alone[case]["parameters"].keys()
        for path, value in alone[case]["parameters"].items():
            actual = np.array(rank[case]["parameters"][path])
            np.testing.assert_allclose(actual, value, atol=1e-4, err_msg=path)
    assert ranks[0][case]["parameters"] == ranks[1][case]["parameters"]


def test_ranks_skip_a_step_together(results: Any) -> None:
    alone, ranks = results
    assert [rank["skip"]["steps"] for rank in ranks] == [19, 19]
    assert alone["skip"]["steps"] == 19
    for path, value in alone["skip"]["parameters"].items():
        for rank in ranks:
            actual = np.array(rank["skip"]["parameters"][path])
            np.testing.assert_allclose(actual, value, atol=1e-4, err_msg=path)


def test_clipping_by_arguments(results: Any) -> None:
    alone, ranks = results
    norm = np.sqrt(np.sum(np.arange(8.0) ** 2) + 25)
    for found in (alone, *ranks):
        assert found["clip"][0] == pytest.approx(norm)
        np.testing.assert_allclose(found["clip"][1], [3 / norm, 4 / norm], rtol=1e-5)


@pytest.mark.parametrize(("case", "name"), [("muon", "Muon"), ("adafactor", "Ada")])
def test_shards_of_what_must_be_whole_are_refused(
    results: Any, case: str, name: str
) -> None:
    _, ranks = results
    for rank in ranks:
        message, is_unchanged = rank[case]
        assert name in message and "is a shard" in message
        assert is_unchanged


def test_arguments_are_checked() -> None:
    optimizer = optim.SGD(0.1, max_grad_norm=1.0)
    tree = {"w": mx.ones(3)}
    with pytest.raises(TypeError, match="group is of type int"):
        optimizer.apply_gradients(tree, tree, group=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sharded is of type str"):
        optimizer.apply_gradients(tree, tree, sharded="w")
    with pytest.raises(ValueError, match="sharded names v; expected paths"):
        optim.clip_grad_norm(tree, 1.0, sharded=["v"])
    # One rank has all of every shard.
    updated = optimizer.apply_gradients(tree, tree, sharded=["w"])
    assert mx.allclose(updated["w"], 1 - 0.1 / mx.sqrt(mx.array(3.0))).item()
