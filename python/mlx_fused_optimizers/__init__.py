"""Drop-in replacements for ``mlx.optimizers`` with fused, in-place updates.

    import mlx_fused_optimizers as optim  # was: import mlx.optimizers as optim

Every name of ``mlx.optimizers`` 0.32.4 is here. The elementwise optimizers and
clip_grad_norm are fused; the other names are those of ``mlx.optimizers``.
"""

from ._requirements import check_mlx

check_mlx()

from mlx.optimizers import (  # noqa: E402
    Adafactor,
    MultiOptimizer,
    Muon,
    cosine_decay,
    exponential_decay,
    join_schedules,
    linear_schedule,
    step_decay,
)

from ._version import __version__  # noqa: E402
from .clipping import clip_grad_norm  # noqa: E402
from .optimizers import (  # noqa: E402
    SGD,
    AdaDelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    Optimizer,
    RMSprop,
)

__all__ = [
    "SGD",
    "AdaDelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "MultiOptimizer",
    "Muon",
    "Optimizer",
    "RMSprop",
    "__version__",
    "clip_grad_norm",
    "cosine_decay",
    "exponential_decay",
    "join_schedules",
    "linear_schedule",
    "step_decay",
]
