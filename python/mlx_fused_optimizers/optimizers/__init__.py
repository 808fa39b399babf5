"""The optimizer classes."""

from .adam import Adam, Adamax, AdamW
from .adaptive import AdaDelta, Adagrad, RMSprop
from .base import FusedOptimizer, Optimizer
from .lion import Lion
from .sgd import SGD

__all__ = [
    "SGD",
    "AdaDelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FusedOptimizer",
    "Lion",
    "Optimizer",
    "RMSprop",
]
