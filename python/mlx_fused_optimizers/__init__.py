"""Drop-in replacements for ``mlx.optimizers`` with fused, in-place updates.

    import mlx_fused_optimizers as optim  # was: import mlx.optimizers as optim

Every name of ``mlx.optimizers`` 0.32.4 is here, with the same arguments and numbers.
"""

from ._extension import _ext as _ext  # first: the others take it from here
from ._kernels import backend
from ._version import __version__
from .checkpoint import load, save
from .clipping import clip_grad_norm
from .filters import decay_matrices_only
from .optimizers import (
    LAMB,
    SGD,
    AdaBelief,
    AdaDelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Adan,
    AdEMAMix,
    Lion,
    MultiOptimizer,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    fuse,
)
from .precision import cast_model, full_precision
from .schedulers import (
    constant,
    cosine_decay,
    exponential_decay,
    inverse_sqrt,
    join_schedules,
    linear_schedule,
    polynomial_decay,
    step_decay,
    warmup_stable_decay,
)
from .sharded import ShardedOptimizer

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
    "Lion",
    "MultiOptimizer",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "ShardedOptimizer",
    "__version__",
    "backend",
    "cast_model",
    "clip_grad_norm",
    "constant",
    "cosine_decay",
    "decay_matrices_only",
    "exponential_decay",
    "full_precision",
    "fuse",
    "inverse_sqrt",
    "join_schedules",
    "linear_schedule",
    "load",
    "polynomial_decay",
    "save",
    "step_decay",
    "warmup_stable_decay",
]
