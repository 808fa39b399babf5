"""What each rank of tests/test_distributed.py does: a case's name, then its results.

Run with MLX_HOSTFILE and MLX_RANK as one of several ranks, or with neither alone.
Prints the case's results as JSON.
"""

import json
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
from mlx.utils import tree_flatten

STEPS = 20
WIDTH, HIDDEN = 8, 16


class Block(nn.Module):
    """A residual block whose two layers can be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        h: mx.array = self.down(nn.gelu(self.up(self.norm(x))))
        return x + h


def scatter_by_sum(x: mx.array, group: Any = None, **_: Any) -> mx.array:
    """What rings lack."""
    total = mx.distributed.all_sum(x, group=group)
    part = x.shape[0] // group.size()
    return total[group.rank() * part : (group.rank() + 1) * part]


def build(kind: str, group: mx.distributed.Group) -> nn.Module:
    """The same model on each number of ranks."""
    mx.random.seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, WIDTH))
    if group.size() > 1 and kind == "tensor":
        for block in model.layers[:2]:
            up, down = block.up, block.down
            block.up = nn.layers.distributed.shard_linear(
                up, "all-to-sharded", group=group
            )
            block.down = nn.layers.distributed.shard_linear(
                down, "sharded-to-all", group=group
            )
    if group.size() > 1 and kind == "fully":
        mx.distributed.sum_scatter = scatter_by_sum
        model.layers[:2] = [
            nn.fully_shard(block, group=group) for block in model.layers[:2]
        ]
    mx.eval(model.parameters())
    return model


def whole(model: nn.Module, group: mx.distributed.Group) -> dict[str, Any]:
    """All parameters, of shards those of all ranks."""
    found: dict[str, Any] = {}
    flat: Any = tree_flatten(model.parameters())
    shards = optim.shards.shards_of_model(model, model.trainable_parameters())
    for path, x in flat:
        if path in shards:
            axis = 1 if path.endswith("down.weight") and "module" not in path else 0
            rows = mx.distributed.all_gather(x.swapaxes(0, axis), group=group)
            mx.eval(rows)
            x = rows.swapaxes(0, axis)
        found[path.replace(".module", "")] = x.tolist()
    return found


def train(kind: str, optimizer: Any, compiled: bool, nan_at: int | None) -> Any:
    group = mx.distributed.init()
    model = build(kind, group)
    optimizer.init(model.trainable_parameters())

    def loss(m: nn.Module, x: mx.array) -> mx.array:
        value: mx.array = mx.square(m(x) - 1).mean()
        return value

    def step(x: mx.array, poison: mx.array) -> Any:
        value, gradients = nn.value_and_grad(model, loss)(model, x)
        # Of the first rank's alone, and there of a shard.
        first: Any = gradients["layers"][0]
        inner = first.get("module", first)
        inner["up"]["weight"] = inner["up"]["weight"] + poison
        optimizer.update(model, gradients)
        return value

    state = [model.state, optimizer.state]
    run: Any = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for i in range(STEPS):
        x = mx.random.normal((4, WIDTH), key=mx.random.key(i))
        is_poisoned = i == nan_at and group.rank() == 0
        mx.eval(run(x, mx.array(mx.nan if is_poisoned else 0.0)), state)
    return {
        "parameters": whole(model, group),
        "norm": optimizer.grad_norm.item(),
        "steps": optimizer.step.item(),
    }


def refused(optimizer: Any) -> Any:
    """The error of shards that should be whole, and whether anything changed."""
    group = mx.distributed.init()
    model = build("tensor", group)
    optimizer.init(model.trainable_parameters())
    before = str(model.parameters()) + str(optimizer.state)
    gradients = model.trainable_parameters()
    try:
        optimizer.update(model, gradients)
    except ValueError as error:
        return [str(error), before == str(model.parameters()) + str(optimizer.state)]
    return ["no error", True]


def clipped() -> Any:
    group = mx.distributed.init()
    rows = mx.arange(8.0).reshape(4, 2)
    part = rows[group.rank() :: group.size()]
    gradients = {"shard": part, "whole": mx.array([3.0, 4.0])}
    found, norm = optim.clip_grad_norm(gradients, 1.0, group, ["shard"])
    return [norm.item(), found["whole"].tolist()]


def parts(**options: Any) -> Any:
    adam = optim.Adam(1e-2, max_grad_norm=0.05)
    lion = optim.Lion(1e-3)
    return optim.MultiOptimizer([adam, lion], [lambda p, a: "up" in p], **options)


CLIP: dict[str, Any] = {"max_grad_norm": 0.05}
CASES: dict[str, Any] = {
    "tensor": lambda: train("tensor", optim.AdamW(1e-2, **CLIP), False, None),
    "compiled": lambda: train("tensor", optim.AdamW(1e-2, **CLIP), True, None),
    "fully": lambda: train("fully", optim.AdamW(1e-2, **CLIP), False, None),
    "skip": lambda: train(
        "tensor", optim.SGD(0.1, momentum=0.9, skip_nonfinite=True, **CLIP), False, 7
    ),
    "multi": lambda: train("tensor", parts(**CLIP), False, None),
    "last": lambda: train(
        "tensor", optim.AdamW(1e-2, clip_by_last_norm=True, **CLIP), False, None
    ),
    "muon": lambda: refused(optim.Muon(1e-2)),
    "adafactor": lambda: refused(optim.Adafactor()),
    "clip": clipped,
}

if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    print(json.dumps({name: CASES[name]() for name in sys.argv[1:]}))
