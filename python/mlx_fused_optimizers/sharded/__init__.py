"""An optimizer whose state and work are shared out among ranks."""

from .optimizer import ShardedOptimizer

__all__ = ["ShardedOptimizer"]
