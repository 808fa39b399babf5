"""Fine-tunes a small Llama by LoRA with mlx-lm's own trainer and our AdamW.

The same run with stock AdamW comes first; the losses of both must agree. The model is
made here, with random weights, and so is its tokenizer: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optimizers
import numpy as np
from mlx_lm.models import llama
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

TOLERANCE = 1e-4  # rounding in a step comes back through the gradients of the next
BATCH_SIZE = 2

# Abraham Lincoln, Gettysburg, 1863.
TEXT = """\
Four score and seven years ago our fathers brought forth on this continent, a new \
nation, conceived in Liberty, and dedicated to the proposition that all men are \
created equal.
Now we are engaged in a great civil war, testing whether that nation, or any nation \
so conceived and so dedicated, can long endure.
We are met on a great battle-field of that war.
We have come to dedicate a portion of that field, as a final resting place for those \
who here gave their lives that that nation might live.
It is altogether fitting and proper that we should do this.
But, in a larger sense, we can not dedicate, we can not consecrate, we can not hallow \
this ground.
The brave men, living and dead, who struggled here, have consecrated it, far above \
our poor power to add or detract.
The world will little note, nor long remember what we say here, but it can never \
forget what they did here.
It is for us the living, rather, to be dedicated here to the unfinished work which \
they who fought here have thus far so nobly advanced.
"""


class ByteTokenizer:
    """A token a byte of UTF-8, and one for the end."""

    eos_token_id = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Losses(TrainingCallback):  # type: ignore[misc, unused-ignore]
    """Keeps what the trainer reports."""

    def __init__(self) -> None:
        self.train: dict[int, float] = {}
        self.validation: dict[int, float] = {}

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.train[info["iteration"]] = info["train_loss"]

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.validation[info["iteration"]] = info["val_loss"]


def make_model() -> llama.Model:
    config = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=ByteTokenizer.vocab_size,
    )
    model = llama.Model(config)
    model.freeze()
    lora = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, config.num_hidden_layers, lora)
    mx.eval(model.parameters())
    return model


def fine_tune(optim: ModuleType, lines: list[str], iters: int, seed: int) -> Losses:
    mx.random.seed(seed)  # the weights
    np.random.seed(seed)  # the trainer's batches
    model = make_model()
    optimizer = optim.AdamW(learning_rate=1e-3, weight_decay=0.01)  # the only change
    examples = [{"text": line} for line in lines]
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        train(
            model,
            optimizer,
            train_dataset=CacheDataset(TextDataset(examples, ByteTokenizer())),
            val_dataset=CacheDataset(TextDataset(examples, ByteTokenizer())),
            args=TrainingArgs(
                batch_size=BATCH_SIZE,
                iters=iters,
                val_batches=-1,
                steps_per_report=max(1, iters // 10),
                steps_per_eval=iters,
                max_seq_length=256,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
            ),
            training_callback=losses,
        )
    return losses


def compare(stock: Losses, ours: Losses) -> float:
    """Prints both libraries' losses, a line a report; gives the largest difference."""
    print(f"\n{'':14}{'mlx.optimizers':>16}{'mlx_fused_optimizers':>22}")
    differences = []
    for kind in ("train", "validation"):
        reference, losses = getattr(stock, kind), getattr(ours, kind)
        for iteration, loss in reference.items():
            print(f"{kind:10}{iteration:4}{loss:16.6f}{losses[iteration]:22.6f}")
            differences.append(abs(loss - losses[iteration]))
    return float(np.max(differences))  # not a number, if one of them is not


def at_least(least: int, text: str) -> int:
    if not (text.isdecimal() and int(text) >= least):
        message = f"expected an integer from {least}, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    hint = "training steps of each library, default: %(default)s"
    add("--iters", type=partial(at_least, 2), default=100, metavar="N", help=hint)
    hint = "of weights and batches, default: %(default)s"
    add("--seed", type=partial(at_least, 0), default=0, metavar="N", help=hint)
    hint = "a UTF-8 file, an example a line; default: a passage in this script"
    add("--text", type=Path, metavar="PATH", help=hint)
    given = parser.parse_args(arguments)
    try:
        text = TEXT if given.text is None else given.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read {given.text}: {error}")
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < BATCH_SIZE:
        parser.error(f"{given.text} has {len(lines)} lines; needs {BATCH_SIZE}")

    runs = []
    for optim in (mlx.optimizers, mlx_fused_optimizers):
        print(f"{optim.__name__}.AdamW:")
        runs.append(fine_tune(optim, lines, given.iters, given.seed))
    difference = compare(*runs)
    print(f"largest difference: {difference:.1e}")
    if not difference <= TOLERANCE:
        print(f"error: the losses differ by over {TOLERANCE}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
