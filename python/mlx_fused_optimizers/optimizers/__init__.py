"""The optimizer classes."""

from .adafactor import Adafactor
from .adam import Adam, Adamax, AdamW
from .adaptive import AdaDelta, Adagrad, RMSprop
from .ademamix import AdEMAMix
from .base import Optimizer
from .fused import FusedOptimizer
from .lion import Lion
from .multi import MultiOptimizer
from .muon import Muon
from .sgd import SGD

__all__ = [
    "SGD",
    "AdEMAMix",
    "AdaDelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FusedOptimizer",
    "Lion",
    "MultiOptimizer",
    "Muon",
    "Optimizer",
    "RMSprop",
]
