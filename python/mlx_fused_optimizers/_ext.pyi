from collections.abc import Sequence

import mlx.core as mx

def fused_update(
    rule: str,
    hyperparameters: Sequence[float],
    parameters: Sequence[mx.array],
    gradients: Sequence[mx.array],
    states: Sequence[Sequence[mx.array]],
    learning_rate: mx.array,
    step: mx.array,
    gradient_scale: mx.array | None = None,
) -> tuple[list[mx.array], list[list[mx.array]]]: ...
def global_norm(
    arrays: Sequence[mx.array], max_norm: mx.array
) -> tuple[mx.array, mx.array]: ...
def scale(arrays: Sequence[mx.array], factor: mx.array) -> list[mx.array]: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
