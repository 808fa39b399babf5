"""A whole training step of a small GPT, with ours and with mlx.optimizers.

``python -m bench.train_step [--text FILE]`` trains a model with each on the characters
of a text, eager and under ``mx.compile``, a step of each in turn, and prints tokens a
second, peak memory and losses. The default text is the United States Declaration of
Independence, in the public domain. Writes ``train_step.json`` to bench/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
from tqdm import tqdm

from . import peers, report

TEXT = Path(__file__).parent / "text" / "declaration_of_independence.txt"


class GPT(nn.Module):
    """A decoder over characters, with learned positions."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.TransformerEncoder(
            layers, width, num_heads=max(1, width // 64), norm_first=True
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        length = tokens.shape[1]
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length)
        x = self.tokens(tokens) + self.positions(mx.arange(length))
        logits: mx.array = self.head(self.blocks(x, mask))
        return logits


def loss_of(model: GPT, tokens: mx.array) -> mx.array:
    logits = model(tokens[:, :-1])
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


class Run:
    """A model that is trained with one library's optimizer."""

    def __init__(
        self, module: Any, compiled: bool, options: argparse.Namespace, vocabulary: int
    ) -> None:
        mx.random.seed(0)
        self.model = GPT(vocabulary, options.context, options.width, options.layers)
        self.optimizer = getattr(module, options.optimizer)(learning_rate=1e-3)
        self.optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, self.optimizer.state]
        mx.eval(self.state)
        self.loss_and_grad = nn.value_and_grad(self.model, loss_of)
        self.train = self.step
        if compiled:
            self.train = mx.compile(self.step, inputs=self.state, outputs=self.state)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def step(self, tokens: mx.array) -> mx.array:
        loss, gradients = self.loss_and_grad(self.model, tokens)
        self.optimizer.update(self.model, gradients)
        return loss  # type: ignore[no-any-return]

    def measure(self, tokens: mx.array, counts: bool) -> None:
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start = time.perf_counter()
        loss = self.train(tokens)
        mx.eval(loss, self.state)
        if counts:
            self.seconds.append(time.perf_counter() - start)
            self.peak = max(self.peak, mx.get_peak_memory() - before)
        self.losses.append(float(loss.item().real))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_step", description=__doc__
    )
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument(
        "--optimizer", default="AdamW", choices=["AdamW", "Lion", "SGD"]
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", choices=["cpu", "gpu"])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results"
    )
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    if len(text) <= options.context + 1:
        parser.error(f"{options.text} has {len(text)} characters; expected more")
    if options.device:
        mx.set_default_device(mx.gpu if options.device == "gpu" else mx.cpu)
    alphabet = sorted(set(text))
    encoded = np.array([alphabet.index(character) for character in text])
    rng = np.random.default_rng(0)
    runs = {
        label: Run(module, compiled, options, len(alphabet))
        for label, module, compiled in (
            (peers.OURS, optim, False),
            (peers.STOCK, stock, False),
            (peers.OURS_COMPILED, optim, True),
            (peers.STOCK_COMPILED, stock, True),
        )
    }
    warm_up = 3
    for i in tqdm(range(-warm_up, options.steps), unit="step", disable=None):
        starts = rng.integers(0, len(encoded) - options.context - 1, options.batch)
        batch = [encoded[s : s + options.context + 1] for s in starts]
        tokens = mx.array(np.stack(batch))
        for run in runs.values() if i % 2 else reversed(runs.values()):
            run.measure(tokens, counts=i >= 0)
    count = options.batch * options.context
    rows = [
        {
            "optimizer": f"{options.optimizer}, {name}",
            "tokens a second": round(count / statistics.median(run.seconds)),
            "milliseconds a step": round(1e3 * statistics.median(run.seconds), 1),
            "peak MB beyond model and state": round(run.peak / 1e6, 1),
            "first loss": round(run.losses[0], 4),
            "last loss": round(run.losses[-1], 4),
        }
        for name, run in runs.items()
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(options).items()}
    settings["text"] = options.text.name
    settings.pop("output")
    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    result = {
        "machine": report.machine(device, options.steps),
        "settings": settings,
        "rows": rows,
    }
    path = options.output / "train_step.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(report.table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
