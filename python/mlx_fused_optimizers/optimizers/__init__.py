"""The optimizer classes."""

from .adam import Adam, AdamW
from .base import FusedOptimizer, Optimizer
from .lion import Lion
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "FusedOptimizer", "Lion", "Optimizer"]
