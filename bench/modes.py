"""How weights and states can be held, for benchmarks to compare."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx


class Mode(NamedTuple):
    """The dtype of weights and gradients, and the options of an optimizer of ours."""

    dtype: mx.Dtype
    options: dict[str, Any]


FLOAT32 = "float32"
INT8, INT4 = "bf16 + 24bit, int8 states", "bf16 + 24bit, int4 states"
MODES = {
    FLOAT32: Mode(mx.float32, {}),
    "float32, int8 states": Mode(mx.float32, {"state_dtype": "int8"}),
    INT8: Mode(mx.bfloat16, {"master_weights": "24bit", "state_dtype": "int8"}),
    INT4: Mode(mx.bfloat16, {"master_weights": "24bit", "state_dtype": "int4"}),
    "bf16 + 32bit, float32 states": Mode(mx.bfloat16, {"master_weights": "32bit"}),
    "bf16, stochastic rounding, float32 states": Mode(
        mx.bfloat16, {"stochastic_rounding": True, "state_dtype": mx.float32}
    ),
    "bf16, float32 states": Mode(mx.bfloat16, {"state_dtype": mx.float32}),
    "bf16": Mode(mx.bfloat16, {}),
}
