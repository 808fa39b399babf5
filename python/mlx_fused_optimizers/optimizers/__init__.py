"""The optimizer classes."""

from .adafactor import Adafactor
from .adam import Adam, Adamax, AdamW
from .adaptive import AdaDelta, Adagrad, RMSprop
from .ademamix import AdEMAMix
from .base import Optimizer
from .fuse import fuse
from .fused import FusedOptimizer
from .lion import Lion
from .multi import MultiOptimizer
from .muon import Muon
from .schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from .sgd import SGD
from .variants import LAMB, AdaBelief, Adan, NAdam, RAdam

__all__ = [
    "LAMB",
    "SGD",
    "AdEMAMix",
    "AdaBelief",
    "AdaDelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "FusedOptimizer",
    "Lion",
    "MultiOptimizer",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "fuse",
]
