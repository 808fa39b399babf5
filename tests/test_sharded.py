"""ShardedOptimizer: several ranks beside one process."""

from __future__ import annotations

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import killed_ranks
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from killed_ranks import Loss, attempt
from mlx_fused_optimizers.sharded.layout import (
    ALIGNMENT,
    Tensor,
    buckets_of,
    padded,
    runs_of,
)
from ranks import launch
from sharded_ranks import CASES
from support import MLX_VERSION

# Of plain operations the norm is a float32 sum, whose bits depend on the pieces.
pytestmark = pytest.mark.fused
SCRIPT = Path(__file__).with_name("sharded_ranks.py")
SECONDS = 300  # after which a rank is killed
OTHERS = ["exact", "rounded", "moved", "modules", "averaged-weights"]


def run(ranks: int, of: int, folder: Path, cases: list[str]) -> list[Any]:
    """The results of each rank; alone it takes the mean of as many gradients."""
    ended = launch(SCRIPT, ranks, folder, [str(of), str(folder), *cases], SECONDS)
    return [rank.result for rank in ended]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def results(folder: Path) -> Any:
    """One process's results, and those of two ranks."""
    cases = [*CASES, *OTHERS]
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(run, 1, 2, folder, cases)
        ranks = pool.submit(run, 2, 2, folder, [*cases, "refused"])
        return alone.result()[0], ranks.result()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_to_the_bit(
    results: Any, folder: Path, case: str
) -> None:
    """Parameters, norms and, in the checkpoint, the whole state; skips too."""
    alone, ranks = results
    for rank in ranks:
        for key in ("parameters", "step", "norm"):
            assert rank[case][key] == alone[case][key], key
    files = [folder / f"{case}-{count}.safetensors" for count in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_cases_move_and_skip(results: Any) -> None:
    """So that equal results mean something."""
    alone, _ = results
    for case, (_, arguments) in CASES.items():
        steps = arguments.get("steps", 50) - ("nan_at" in arguments)
        assert alone[case]["step"] == arguments.get("counts", steps), case
        assert np.isfinite(alone[case]["sums"]).all(), case
    assert len({alone[case]["parameters"] for case in CASES}) >= len(CASES) - 4


def test_a_rank_has_half_of_the_state(results: Any) -> None:
    alone, ranks = results
    for case in ("decay", "buckets", "half"):
        sizes = [rank[case]["bytes"] for rank in ranks]
        assert sum(sizes) == pytest.approx(alone[case]["bytes"], abs=100)
        # Rows end at blocks, and this model is small.
        assert max(sizes) < 0.55 * alone[case]["bytes"]


def test_a_changed_model_keeps_its_state(results: Any, folder: Path) -> None:
    alone, ranks = results
    assert [rank["moved"] for rank in ranks] == [alone["moved"]] * 2
    files = [folder / f"moved-{count}.safetensors" for count in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_model_with_frozen_layers(results: Any, folder: Path) -> None:
    alone, ranks = results
    for found in (alone, *ranks):
        assert found["modules"] == alone["modules"]
        assert found["modules"][0] == found["modules"][1]  # load undoes a change
    files = [folder / f"adapters-{count}.safetensors" for count in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_averages_are_those_of_the_gathered_state(results: Any) -> None:
    alone, ranks = results
    for rank in ranks:
        assert rank["averaged-weights"][:2] == alone["averaged-weights"][:2]
    assert alone["averaged-weights"][0] != alone["averaged-weights"][1]


REFUSED = {
    "shape": r"init: ranks differ\. Rank 0 has .*'b': .*\(7,\).*rank 1 .*\(8,\)",
    "path": "Rank 0 has nothing; rank 1 has parameter 'c'",
    "dtype": r"Rank 0 has parameter 'b': mlx.core.float32 .*float16",
    "values": r"'b': .*\(7,\), .* bits that sum to .*'b': .*\(7,\), .* bits",
    "rate": "step 1: ranks differ. Rank 0 has learning_rate 0.10.*; rank 1 .* 0.20",
    "type": "the value of 'a' is of type float; expected an mx.array",
    "name": "the parameter 'step' has the name of an entry",
    "setting": "Rank 0 has configuration 'eps': 1e-06; rank 1 has .*1e-08",
    "bucket": "Rank 0 has bucket_size 100; rank 1 has bucket_size 101",
    "class": "Rank 0 has configuration 'class': 'SGD'; rank 1 has .*'Lion'",
    "missing": "step 1: ranks differ. Rank 0 has gradient 'b'.*; rank 1 has nothing",
    "gradient-dtype": "Rank 0 has gradient 'a': mlx.core.float32; rank 1 .*float16",
    "gradient-shape": r"the gradient of 'a' has shape \(5, 4\); expected \(4, 5\)",
    "unknown": "KeyError: .*the gradient of 'z' has no state",
    "none": "the gradient of 'a' is of type NoneType; expected an mx.array",
    "widened": "the update of .* is of dtype mlx.core.float32.*keeps mlx.core.float16",
    "schedule": "ValueError: no rate",
    "shards": "'weight' is a shard already",
    "load": "FileNotFoundError: .*none-",
    "save": "FileNotFoundError: .*is not a directory",
}


@pytest.mark.parametrize("case", REFUSED)
def test_all_ranks_refuse_together(results: Any, case: str) -> None:
    """Nothing has changed then, and all can go on."""
    _, ranks = results
    for rank in ranks:
        assert re.search(REFUSED[case], rank["refused"][case]), rank["refused"][case]
        assert "changed the state" not in rank["refused"][case]
        assert rank["refused"]["good"]


@pytest.fixture(scope="module")
def more_ranks(folder: Path, results: Any) -> Any:
    """Of 3 and 4 ranks, and of one process that takes as many gradients."""
    found = {}
    for count in (3, 4):
        (alone,) = run(1, count, folder, ["rounded"])
        found[count] = alone, run(count, count, folder, ["rounded"])
    return found


@pytest.mark.parametrize("count", [3, 4])
def test_more_ranks_differ_by_the_order_of_sums(more_ranks: Any, count: int) -> None:
    alone, ranks = more_ranks[count]
    for path, expected in alone["rounded"].items():
        np.testing.assert_allclose(
            ranks[0]["rounded"][path], expected, atol=2e-5, err_msg=path
        )
    assert all(rank == ranks[0] for rank in ranks)


def test_any_number_of_ranks_loads_what_others_saved(folder: Path) -> None:
    """To the bit, and the files are the same; sums are exact here."""
    for count in (1, 2, 3, 4):
        run(count, 12, folder, ["exact"])
    saved = [folder / f"exact-{count}.safetensors" for count in (1, 2, 3, 4)]
    assert len({path.read_bytes() for path in saved}) == 1
    digests = set()
    for count in (1, 2, 3, 4):
        for rank in run(count, 12, folder, ["resharded"]):
            digests |= {*rank["resharded"].values()}
    assert len(digests) == 1
    for name in ("again", "on"):
        files = [*folder.glob(f"{name}-*.safetensors")]
        assert len(files) == 16
        assert len({path.read_bytes() for path in files}) == 1
    again = folder / "again-1-1.safetensors"
    assert saved[0].read_bytes() == again.read_bytes()


LOSSES = [
    (2, "one", Loss("KILL", "before", 0)),
    (2, "several", Loss("KILL", "during", 2)),
    (2, "several", Loss("KILL", "before", 4)),
    (2, "several", Loss("KILL", "after", 8)),
    (3, "several", Loss("KILL", "before", 7)),
    (2, "one", Loss("STOP", "before", 1, 3.0)),
]


@pytest.mark.parametrize(("ranks", "bucket", "loss"), LOSSES, ids=str)
def test_ranks_end_when_one_is_lost(ranks: int, bucket: str, loss: Loss) -> None:
    """With the parameters of a whole step; python tests/killed_ranks.py tries more."""
    if loss.signal == "KILL" and MLX_VERSION < (0, 32, 2):
        pytest.skip("this MLX's ring waits for a peer that is gone")
    _, fault, _ = attempt(ranks, bucket, loss)
    assert fault is None


# One process


def test_one_rank_is_the_optimizer_itself(tmp_path: Path) -> None:
    group = mx.distributed.init()
    tree = {"w": mx.ones((4, 3))}
    inner = optim.AdamW(0.1, max_grad_norm=1.0)
    optimizer = optim.ShardedOptimizer(inner, group=group)
    assert isinstance(optimizer, stock.Optimizer)
    optimizer.init(tree)
    ours = optimizer.apply_gradients(tree, tree)
    plain = optim.AdamW(0.1, max_grad_norm=1.0)
    assert mx.array_equal(ours["w"], plain.apply_gradients(tree, tree)["w"])
    assert optimizer.step.item() == 1
    assert optimizer.grad_norm is not None and optimizer.skipped_steps is None
    optimizer.learning_rate = 0.5
    assert inner.learning_rate.item() == 0.5
    path = tmp_path / "x.safetensors"
    optim.save(path, tree, optimizer)
    other = optim.ShardedOptimizer(optim.AdamW(0.5, max_grad_norm=1.0))
    optim.load(path, tree, other)
    assert mx.array_equal(other.state["w"]["m"], inner.state["w"]["m"])
    model = nn.Linear(2, 2)
    other.init(model.trainable_parameters())
    other.update(model, model.trainable_parameters())
    other.wait(model.parameters())
    state = other.state
    other.state = state
    assert other.state is state


def test_copies_share_the_group() -> None:
    optimizer = optim.ShardedOptimizer(optim.AdamW(0.1), timeout=3)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.optimizer is not optimizer.optimizer
        other.init({"w": mx.ones(3)})
        assert "w" not in optimizer.state


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"optimizer": 3}, TypeError, "optimizer is of type int"),
        ({"group": 3}, TypeError, "group is of type int"),
        ({"bucket_size": 1.5}, TypeError, "bucket_size is of type float"),
        ({"bucket_size": 0}, ValueError, r"bucket_size should be in \[1, 1073741824\]"),
        ({"bucket_size": 1 << 31}, ValueError, "bucket_size should be in"),
        (
            {"gradients": "none"},
            ValueError,
            "gradients should be 'local' or 'averaged'",
        ),
        ({"timeout": "3"}, TypeError, "timeout is of type str"),
        ({"timeout": 0}, ValueError, "timeout should be >0, 0 was provided"),
        (
            {"optimizer": optim.ShardedOptimizer(optim.SGD(0.1))},
            TypeError,
            "sharded already",
        ),
        (
            {"optimizer": stock.MultiOptimizer([stock.SGD(0.1)])},
            TypeError,
            "expected that of mlx_fused_optimizers",
        ),
    ],
)
def test_arguments_are_checked(arguments: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        optim.ShardedOptimizer(**{"optimizer": optim.SGD(0.1), **arguments})


def test_a_part_cannot_be_sharded() -> None:
    with pytest.raises(TypeError, match="shard the MultiOptimizer"):
        optim.MultiOptimizer([optim.ShardedOptimizer(optim.SGD(0.1))])


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("bucket_size", [1, 4096, 1 << 20])
def test_layouts_have_each_element_once(ranks: int, bucket_size: int) -> None:
    rng = np.random.default_rng(ranks)
    tensors = [
        Tensor(f"{i}", (int(size),), dtype, int(i % 2), bool(i % 5))
        for i, size in enumerate([*rng.integers(0, 9000, 40), 0, 1, 64, 65])
        for dtype in [(mx.float32, mx.bfloat16)[i % 3 == 0]]
    ]
    buckets = buckets_of(tensors, ranks, bucket_size)
    found: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(tensors))}
    keys = set()
    for bucket in buckets:
        assert len({tensors[i].dtype for i in bucket.tensors}) == 1
        assert sum(run.size for run in runs_of(bucket)) <= bucket.length * ranks
        for number, row in enumerate(bucket.rows):
            for piece in row:
                assert (piece.key, number) not in keys
                keys.add((piece.key, number))
                assert piece.begin % ALIGNMENT == 0
                if not tensors[piece.tensor].is_elementwise:
                    assert piece.is_whole
                found[piece.tensor].append((piece.begin, piece.end))
    for number, parts in found.items():
        size = tensors[number].size
        ends = [begin for begin, _ in sorted(parts)] + [size]
        assert [end for _, end in sorted(parts)] == ends[1:]
        assert ends[0] == 0
    rows = [[0] * ranks for _ in range(2)]
    for bucket in buckets:
        for number, row in enumerate(bucket.rows):
            for piece in row:
                size = padded(piece.end - piece.begin)
                rows[piece.is_whole][number] += size
    if bucket_size == 1 << 20:
        most, mean = max(rows[0]), sum(rows[0]) / ranks
        assert most <= mean + 8 * ALIGNMENT


def test_the_matrix_of_losses_has_every_collective() -> None:
    assert killed_ranks.COLLECTIVES == {"one": 5, "several": 9}


def test_the_example_trains_as_one_process(tmp_path: Path) -> None:
    """And goes on from the other's checkpoint."""
    example = SCRIPT.parents[1] / "examples" / "train_distributed.py"
    arguments = ["--steps", "20", "--width", "32", "--checkpoint"]
    outputs = []
    for ranks in (1, 2):
        ended = launch(
            example, ranks, tmp_path, [*arguments, f"{tmp_path}/{ranks}"], 60
        )
        assert [rank.code for rank in ended] == [0] * ranks, ended
        outputs.append(ended[0].output.splitlines()[0])
    assert outputs[0].startswith("step 20: loss")
    losses = [float(line.split()[-1]) for line in outputs]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    on = ["--steps", "40", "--width", "32", "--checkpoint", f"{tmp_path}/1"]
    for rank in launch(example, 2, tmp_path, on, 60):
        assert rank.code == 0, rank.errors
