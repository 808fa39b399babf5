"""Train a small network on several machines, each with a part of the optimizer.

    mlx.launch -n 2 --backend ring examples/train_distributed.py

trains with two processes on this machine. On two Macs it takes a hostfile; see the page
"Several machines" of the documentation. Without mlx.launch it trains alone: the losses
are the same, as each rank takes its share of the same batches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
from mlx.utils import tree_flatten


class Network(nn.Module):
    """Two hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(32, width), nn.Linear(width, width)]
        self.head = nn.Linear(width, 1)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = nn.gelu(layer(x))
        result: mx.array = self.head(x)
        return result


def loss_of(model: Network, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.mse_loss(model(x), y)


def batch_of(step: int, size: int) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((size, 32), key=mx.random.key(step))
    return x, mx.sin(x.sum(axis=1, keepdims=True) / 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=256, help="of all ranks together")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=60, help="seconds")
    parser.add_argument("--checkpoint", type=Path, help="a file, loaded if it is there")
    options = parser.parse_args()

    group = mx.distributed.init()
    if options.batch % group.size() > 0:
        parser.error(f"{group.size()} ranks cannot share {options.batch} examples")
    mx.random.seed(0)  # the same model on each rank
    model = Network(options.width)
    optimizer = optim.ShardedOptimizer(
        optim.AdamW(optim.cosine_decay(3e-3, options.steps), max_grad_norm=1.0),
        timeout=options.timeout,
    )
    optimizer.init(model.trainable_parameters())
    if options.checkpoint and options.checkpoint.exists():
        optim.load(options.checkpoint, model, optimizer)
    # Compiled without the update: a lost rank is then an error of update, and not
    # something that mx.eval waits for.
    loss_and_grad = mx.compile(
        lambda *batch: nn.value_and_grad(model, loss_of)(model, *batch),
        inputs=[model.state],
        outputs=[model.state],
    )

    size = options.batch // group.size()
    rows = slice(group.rank() * size, (group.rank() + 1) * size)
    for step in range(int(optimizer.step), options.steps):
        x, y = batch_of(step, options.batch)
        loss, gradients = loss_and_grad(x[rows], y[rows])
        optimizer.update(model, gradients)
        if (step + 1) % 20 == 0:
            loss = mx.distributed.all_sum(loss) / group.size()
            optimizer.wait(loss)
            if group.rank() == 0:
                print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    if options.checkpoint:
        optim.save(options.checkpoint, model, optimizer)

    flat = tree_flatten(optimizer.state)
    held = sum(x.nbytes for _, x in flat)  # type: ignore[union-attr, str-unpack]
    print(f"rank {group.rank()} of {group.size()} holds {held / 1e6:.2f} MB of state")


if __name__ == "__main__":
    main()
