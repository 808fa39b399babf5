"""Models whose gradients a step is measured on, as autodiff gives them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Gradients = dict[str, mx.array]


class Block(nn.Module):
    """A decoder's layer: attention of one head and a gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in "gu")
        self.down = nn.Linear(4 * width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.norm1(x)
        scores = self.query(h) @ self.key(h).swapaxes(-1, -2)
        attention = mx.softmax(scores * scores.shape[-1] ** -0.5, axis=-1)
        x = x + self.output(attention @ self.value(h))
        h = self.norm2(x)
        result: mx.array = x + self.down(nn.silu(self.gate(h)) * self.up(h))
        return result


class Decoder(nn.Module):
    """A small language model; by default 38M parameters in 75 tensors."""

    def __init__(
        self, width: int = 512, layers: int = 8, vocabulary: int = 4096
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = [Block(width) for _ in range(layers)]
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        result: mx.array = self.head(self.norm(x))
        return result


class LoRA(nn.Module):
    """A frozen linear layer with a low-rank adapter, as mlx-lm has it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.linear.freeze()
        self.a = mx.random.normal((width, rank)) * width**-0.5
        self.b = mx.zeros((rank, width))

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = self.linear(x) + (x @ self.a) @ self.b
        return result


class ConvNet(nn.Module):
    """A convolutional classifier; 5.9M parameters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width, 12 * width]
        pairs = itertools.pairwise(widths)
        self.layers = [nn.Conv2d(*pair, 3, stride=2, padding=1) for pair in pairs]
        self.head = nn.Linear(widths[-1], 1000)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = nn.relu(layer(x))
        result: mx.array = self.head(x.mean(axis=(1, 2)))
        return result


def _gradients(
    model: nn.Module, dtype: mx.Dtype, inputs: mx.array, targets: mx.array
) -> Gradients:
    model.set_dtype(dtype)
    if inputs.dtype == mx.float32:
        inputs = inputs.astype(dtype)

    def loss(model: Any, x: mx.array, y: mx.array) -> mx.array:
        logits = model(x).astype(mx.float32)
        return nn.losses.cross_entropy(logits, y, reduction="mean")

    _, gradients = nn.value_and_grad(model, loss)(model, inputs, targets)
    flat: Any = tree_flatten(gradients)
    mx.eval(gradients)
    return dict(flat)


def decoder(dtype: mx.Dtype, **sizes: int) -> Gradients:
    """The gradients of a decoder over a few tokens."""
    model = Decoder(**sizes)
    vocabulary = model.head.weight.shape[0]
    tokens = mx.random.randint(0, vocabulary, (1, 33))
    return _gradients(model, dtype, tokens[:, :-1], tokens[:, 1:])


def adapters(dtype: mx.Dtype, width: int = 2048, pairs: int = 128) -> Gradients:
    """Those of rank-8 adapters, two matrices of 16,384 elements for each layer."""
    layers = [LoRA(width, 8) for _ in range(4)]
    # The same frozen layers again and again: their adapters differ, their memory not.
    model = nn.Sequential(*layers)
    model.layers = [LoRA.__new__(LoRA) for _ in range(pairs)]
    for i, layer in enumerate(model.layers):
        nn.Module.__init__(layer)
        layer.linear = layers[i % 4].linear
        layer.a, layer.b = layers[i % 4].a + 0, layers[i % 4].b + 0
    x = mx.random.normal((2, width))
    return _gradients(model, dtype, x, mx.array([1, 2]))


def convolutions(dtype: mx.Dtype) -> Gradients:
    """Those of a convolutional net."""
    images = mx.random.normal((2, 32, 32, 3))
    return _gradients(ConvNet(), dtype, images, mx.array([1, 2]))


def contiguous(gradients: Gradients) -> Gradients:
    """The same, each row-contiguous."""
    result = {path: mx.contiguous(x) for path, x in gradients.items()}
    mx.eval(result)
    return result


REAL: dict[str, Callable[[mx.Dtype], Gradients]] = {
    "decoder": decoder,
    "adapters": adapters,
    "convolutions": convolutions,
}
