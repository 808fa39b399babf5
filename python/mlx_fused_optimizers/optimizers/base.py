"""The step that all share: trees in, one call of the extension, trees out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import mlx.core as mx
import mlx.optimizers as stock
from mlx.utils import tree_flatten

from .. import _ext

if TYPE_CHECKING:
    from typing_extensions import Unpack

FUSED_DTYPES = (mx.float32, mx.float16, mx.bfloat16)

LearningRate = float | Callable[[mx.array], mx.array]
WeightDecayFilter = Callable[[str, mx.array], bool]


class StepOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer takes beyond upstream's."""

    max_grad_norm: float | None
    skip_nonfinite: bool


class FusedOptions(StepOptions, total=False):
    """Those of the optimizers that have state of their own kind."""

    state_dtype: mx.Dtype | None


class DecayOptions(FusedOptions, total=False):
    """Those of the optimizers that have weight decay."""

    weight_decay_filter: WeightDecayFilter | None


class Clip(NamedTuple):
    """What the norm of the gradients makes of a step; all on the device."""

    norm: mx.array | None = None
    scale: mx.array | None = None  # of every gradient; negative: change nothing
    finite: mx.array | None = None  # with skip_nonfinite


def paths(tree: Any) -> list[str]:
    """The paths of a tree's leaves, as in ``mlx.utils.tree_flatten``."""
    flat: Any = tree_flatten(tree)
    return [path for path, _ in flat]


class Optimizer(stock.Optimizer):
    """The base class for optimizers, as ``mlx.optimizers.Optimizer``.

    A subclass defines ``init_single(parameter, state)``, which fills a parameter's
    state dict, and ``apply_single(gradient, parameter, state)``, which returns the
    new parameter and changes that dict.

    When a step raises, the state tree, the scheduled values and the step count are
    what they were before it.

    Args:
        schedulers (dict, optional): Callables that take the step and give the value
            of the state entry of their name.
        max_grad_norm (float, optional): Scale the gradients so that their global norm
            does not exceed this, as :func:`clip_grad_norm` does. Default: ``None``
        skip_nonfinite (bool, optional): A step whose gradients' global norm is not
            finite changes no parameter, no state and no step count, which is decided
            on the device. Default: ``False``

    Raises:
        ValueError: If ``max_grad_norm`` is negative.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False

    def __init__(
        self,
        schedulers: dict[str, Callable[[mx.array], mx.array]] | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(schedulers)
        self._set_step_options(**options)

    def _set_step_options(
        self, max_grad_norm: float | None = None, skip_nonfinite: bool = False
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(
                f"max_grad_norm should be >=0, {max_grad_norm} was provided instead"
            )
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self._add_option_state()

    def _add_option_state(self) -> None:
        # Only then, so that checkpoints stay those of mlx.optimizers by default.
        if self._needs_norm():
            self.state.setdefault("grad_norm", mx.array(0.0))
        if self.skip_nonfinite:
            self.state.setdefault("skipped_steps", mx.array(0, mx.uint64))

    def _needs_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def grad_norm(self) -> mx.array | None:
        """The global norm of the last step's gradients before scaling.

        A float32 scalar; ``None`` without ``max_grad_norm`` and ``skip_nonfinite``.
        """
        norm: mx.array | None = self.state.get("grad_norm")
        return norm

    @property
    def skipped_steps(self) -> mx.array | None:
        """Steps skipped, a uint64; ``None`` without ``skip_nonfinite``."""
        skipped: mx.array | None = self.state.get("skipped_steps")
        return skipped

    def init(self, parameters: Any) -> None:
        """Initialize the optimizer's state.

        Optional: the first step does it. It is useful for access to :attr:`state`
        before that, and needed before ``mx.compile`` captures the state.

        Args:
            parameters (dict): A Python tree of parameters.
        """
        super().init(parameters)
        self._add_option_state()

    def update(self, model: Any, gradients: Any) -> None:
        """Apply the gradients to the parameters of the model and update the model.

        Args:
            model (mlx.nn.Module): The model.
            gradients (dict): A Python tree of gradients, as of
                ``mlx.nn.value_and_grad``.

        Raises:
            KeyError, IndexError: If a gradient has no parameter or no state.
            TypeError: If a gradient or parameter is no array.
            ValueError: If shapes do not fit, or a schedule gives no scalar.
        """
        apply_gradients = getattr(self.apply_gradients, "__func__", None)
        if apply_gradients is not Optimizer.apply_gradients:  # a user's own
            model.update(self.apply_gradients(gradients, model))
            return
        undo = self._remember()
        before = _ext.Snapshot(model)
        try:
            model.update(self._step(gradients, model, None))
        except BaseException:
            undo()
            before.restore()
            raise

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Apply the gradients to the parameters and return the updated parameters.

        Args:
            gradients (dict): A Python tree of gradients.
            parameters (dict): A Python tree of parameters. It can be a superset of
                the gradients.

        Returns:
            dict: The updated parameters, in a tree of the gradients' structure.

        Raises:
            KeyError, IndexError: If a gradient has no parameter or no state.
            TypeError: If a gradient or parameter is no array.
            ValueError: If shapes do not fit, or a schedule gives no scalar.
        """
        undo = self._remember()
        try:
            # Returned from here, so that no interrupt falls behind the guard.
            return self._step(gradients, parameters, None)
        except BaseException:
            undo()
            raise

    def _remember(self) -> Callable[[], None]:
        """What undoes every change of the optimizer's state from now on."""
        was_initialized = self._initialized
        before = _ext.Snapshot(self.state)

        def undo() -> None:
            before.restore()
            self._initialized = was_initialized

        return undo

    def _step(self, gradients: Any, parameters: Any, clip: Clip | None) -> Any:
        """One step; clip is given where it was measured over more than these."""
        if not self._initialized:
            self.init(gradients)
        leaves = _ext.Leaves(gradients, parameters, self.state)
        for name, schedule in self._schedulers.items():
            self.state[name] = self._scheduled(name, schedule(self.step))
        if clip is None:
            clip = self._measure(leaves)
            self._record(clip)
        step = self.step + 1
        if clip.finite is not None:
            step = mx.where(clip.finite, step, self.step)
        self.state["step"] = step
        return self._apply_leaves(leaves, clip.scale)

    def _record(self, clip: Clip) -> None:
        state = self.state
        if clip.norm is not None:
            state["grad_norm"] = clip.norm
        if clip.finite is not None:
            state["skipped_steps"] = state["skipped_steps"] + ~clip.finite

    def _scheduled(self, name: str, value: Any) -> Any:
        if isinstance(value, mx.array) and value.size != 1:
            raise ValueError(
                f"[{type(self).__name__}] the schedule of {name} gave an array of "
                f"shape {value.shape}; expected a scalar"
            )
        # A Python number too: upstream takes only arrays.
        return value if isinstance(value, mx.array) else mx.array(value, mx.float32)

    def _measure(self, leaves: _ext.Leaves) -> Clip:
        if not self._needs_norm():
            return Clip()
        limit = mx.array(math.inf if self.max_grad_norm is None else self.max_grad_norm)
        dtypes = leaves.dtypes()
        if dtypes is None:
            raise self._bad_gradient(leaves)
        if all(dtype in FUSED_DTYPES for dtype in dtypes):
            norm, factor = leaves.global_norm(limit)
        else:
            magnitudes = [mx.abs(g).astype(mx.float32) for g in leaves.gradients]
            norm, factor = _ext.global_norm(magnitudes, limit)
        if self.max_grad_norm is None:
            factor = mx.array(1.0)
        if not self.skip_nonfinite:
            return Clip(norm, factor)
        finite = mx.isfinite(norm)
        return Clip(norm, mx.where(finite, factor, -1.0), finite)

    def _bad_gradient(self, leaves: _ext.Leaves) -> TypeError:
        path, gradient = next(
            (path, gradient)
            for path, gradient in zip(paths(leaves.tree), leaves.gradients, strict=True)
            if not isinstance(gradient, mx.array)
        )
        return TypeError(
            f"[{type(self).__name__}] the gradient of '{path}' is of type "
            f"{type(gradient).__name__}; expected an mx.array"
        )

    def _apply_leaves(self, leaves: _ext.Leaves, scale: mx.array | None) -> Any:
        """The updated parameters' tree; states get their new entries."""
        updated = []
        for leaf in zip(
            leaves.gradients, leaves.parameters, leaves.states, strict=True
        ):
            updated.append(self._apply_one(self.apply_single, *leaf, scale))
        return leaves.replace(updated)

    def _apply_one(
        self,
        apply_single: Callable[..., Any],
        gradient: Any,
        parameter: Any,
        state: Any,
        scale: mx.array | None,
    ) -> Any:
        """The updated parameter; its state gets its new entries."""
        if scale is None:
            return apply_single(gradient, parameter, state)
        before = dict(state)
        scaled = (gradient * scale).astype(gradient.dtype)
        updated = apply_single(scaled, parameter, state)
        skip = scale < 0
        for key, value in before.items():
            state[key] = mx.where(skip, value, state[key])
        return mx.where(skip, parameter, updated)


class FusedRule(NamedTuple):
    """What an optimizer is to the extension."""

    name: str  # in csrc/rules.h
    hyperparameters: tuple[Any, ...]  # in the order of the rule's prepare()
    state_keys: tuple[str, ...]  # in the order of the rule's states


class FusedOptimizer(Optimizer):
    """An optimizer whose update is a rule of ``metal/update_rules.h``.

    A class lists ``mlx.optimizers``' own class as its second base. That one gives
    the checks of the constructor, ``init_single``, and the update by plain MLX
    operations for what no kernel covers.
    """

    state_dtype: mx.Dtype | None = None
    weight_decay_filter: WeightDecayFilter | None = None

    def _set_options(
        self,
        state_dtype: mx.Dtype | None = None,
        weight_decay_filter: WeightDecayFilter | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        if state_dtype is not None and state_dtype not in FUSED_DTYPES:
            raise ValueError(
                f"state_dtype should be float32, float16 or bfloat16, {state_dtype} "
                "was provided instead"
            )
        if weight_decay_filter is not None and not hasattr(self, "weight_decay"):
            raise TypeError(
                f"{type(self).__name__} takes no weight decay, and so no "
                "weight_decay_filter"
            )
        self.state_dtype = state_dtype
        self.weight_decay_filter = weight_decay_filter
        self._set_step_options(**options)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Fill a parameter's state.

        Args:
            parameter (array): The parameter.
            state (dict): Gets arrays of the parameter's shape, and of its dtype or
                ``state_dtype``.
        """
        super().init_single(parameter, state)
        for key, value in state.items():
            state[key] = self._cast(value)

    def _cast(self, value: mx.array) -> mx.array:
        if self.state_dtype is None or value.dtype == self.state_dtype:
            return value
        return value.astype(self.state_dtype)

    def _rule(self, weight_decay: Any) -> FusedRule:
        raise NotImplementedError

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        """Update one parameter and its state.

        Args:
            gradient (array): The gradient.
            parameter (array): The parameter, of the gradient's shape.
            state (dict): The parameter's state; gets the new arrays.

        Returns:
            array: The updated parameter.
        """
        leaves = _ext.Leaves(gradient, parameter, state)
        decay = getattr(self, "weight_decay", 0.0)
        self._update_leaves(leaves, None, None, decay)
        updated: mx.array = leaves.commit()
        return updated

    def _apply_leaves(self, leaves: _ext.Leaves, scale: mx.array | None) -> Any:
        apply_single = getattr(self.apply_single, "__func__", None)
        if apply_single is not FusedOptimizer.apply_single:  # a user's own
            return super()._apply_leaves(leaves, scale)
        try:
            for decay, indices in self._decay_groups(leaves):
                self._update_leaves(leaves, indices, scale, decay)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self._explain(error, leaves)
            raise
        return leaves.commit()

    def _decay_groups(self, leaves: _ext.Leaves) -> list[tuple[Any, list[int] | None]]:
        """Weight decays, and the leaves to which each applies; None if to all."""
        decay = getattr(self, "weight_decay", 0.0)
        if self.weight_decay_filter is None:
            return [(decay, None)]
        groups: dict[bool, list[int]] = {True: [], False: []}
        named = zip(paths(leaves.tree), leaves.parameters, strict=True)
        for i, leaf in enumerate(named):
            groups[bool(self.weight_decay_filter(*leaf))].append(i)
        return [
            (decay if decays else 0.0, indices)
            for decays, indices in groups.items()
            if indices
        ]

    def _update_leaves(
        self,
        leaves: _ext.Leaves,
        indices: list[int] | None,
        scale: mx.array | None,
        weight_decay: Any,
    ) -> None:
        """Compute the leaves of these indices, or all; nothing is changed yet."""
        rule = self._rule(weight_decay)
        fits = self._has_scalars(rule) and leaves.fused_update(
            rule.name,
            rule.hyperparameters,
            rule.state_keys,
            self.state["learning_rate"],
            self.step,
            scale,
            self.state_dtype,
            indices,
        )
        if not fits:
            self._compose(leaves, indices, scale, weight_decay)

    def _has_scalars(self, rule: FusedRule) -> bool:
        """Whether the scalars are of types that the extension takes.

        Upstream takes whatever MLX's operators do, such as a learning rate a column.
        """
        # Adafactor need not have a learning rate.
        scalars = (self.state.get("learning_rate", self.step), self.step)
        return all(isinstance(x, mx.array) and x.ndim == 0 for x in scalars) and all(
            isinstance(h, (int, float)) for h in rule.hyperparameters
        )

    def _has_kernel(
        self, rule: FusedRule, gradient: Any, parameter: Any, state: Any
    ) -> bool:
        """Whether everything of a leaf is of a type that the extension takes."""
        return (
            self._has_scalars(rule)
            and isinstance(gradient, mx.array)
            and isinstance(parameter, mx.array)
            and all(isinstance(state[key], mx.array) for key in rule.state_keys)
        )

    def _fused(
        self,
        rule: FusedRule,
        parameters: list[Any],
        gradients: list[Any],
        states: list[Any],
        scale: mx.array | None,
        learning_rate: mx.array,
        after: list[mx.array] | None = None,
    ) -> tuple[list[mx.array], list[list[mx.array]]]:
        return _ext.fused_update(
            rule.name,
            rule.hyperparameters,
            parameters,
            gradients,
            [[self._cast(state[key]) for state in states] for key in rule.state_keys],
            learning_rate,
            self.step,
            scale,
            keep_dtypes=self.state_dtype is not None,
            after=after or [],
        )

    def _compose(
        self,
        leaves: _ext.Leaves,
        indices: list[int] | None,
        scale: mx.array | None,
        weight_decay: Any,
    ) -> None:
        """The same by upstream's class, for what no kernel covers."""
        usual = vars(self).get("weight_decay")
        trees = leaves.gradients, leaves.parameters, leaves.states
        try:
            if usual is not None:
                self.weight_decay = weight_decay  # what upstream's class reads
            for i in range(len(leaves)) if indices is None else indices:
                gradient, parameter, state = (tree[i] for tree in trees)
                changes = dict(state)
                updated = self._apply_one(
                    super().apply_single, gradient, parameter, changes, scale
                )
                leaves.set(i, updated, changes)
        finally:
            if usual is not None:
                self.weight_decay = usual

    def _explain(self, error: Exception, leaves: _ext.Leaves) -> None:
        """Raise a clearer error, if the leaves tell what is wrong."""
        name = type(self).__name__
        for path, gradient, parameter, state in zip(
            paths(leaves.tree),
            leaves.gradients,
            leaves.parameters,
            leaves.states,
            strict=True,
        ):
            expected: dict[str, Any] = {}
            if isinstance(parameter, mx.array):
                self.init_single(parameter, expected)
            if not isinstance(state, dict) or not state.keys() >= expected.keys():
                found = ", ".join(state) if isinstance(state, dict) else repr(state)
                raise KeyError(
                    f"[{name}] the state of '{path}' has {found or 'nothing'}; "
                    f"expected {', '.join(expected)}. Is it another optimizer's?"
                ) from error
            arrays = {
                "parameter": parameter,
                "gradient": gradient,
                **{key: state[key] for key in expected},
            }
            for kind, array in arrays.items():
                like = expected.get(kind, parameter)
                if not isinstance(array, mx.array):
                    raise TypeError(
                        f"[{name}] the {kind} of '{path}' is of type "
                        f"{type(array).__name__}; expected an mx.array"
                    ) from error
                try:
                    mx.broadcast_shapes(array.shape, like.shape)
                except ValueError:
                    raise ValueError(
                        f"[{name}] the {kind} of '{path}' has shape {array.shape}; "
                        f"expected {like.shape}"
                    ) from error
