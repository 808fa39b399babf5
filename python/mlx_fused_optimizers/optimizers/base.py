"""The step that all share: trees in, one call of the extension, trees out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.optimizers as stock
from mlx.utils import tree_flatten

from .._kernels import kernels
from .options import StepOptions, WeightDecayFilter, documented

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._ext import Leaves
    from .options import DecayOptions

FUSED_DTYPES = (mx.float32, mx.float16, mx.bfloat16)

LearningRate = float | Callable[[mx.array], mx.array]


class Clip(NamedTuple):
    """What the norm of the gradients makes of a step; all on the device."""

    norm: mx.array | None = None
    scale: mx.array | None = None  # multiplies every gradient
    skip: mx.array | None = None  # a bool: nothing changes


def paths(tree: Any) -> list[str]:
    """The paths of a tree's leaves, as in ``mlx.utils.tree_flatten``."""
    flat: Any = tree_flatten(tree)
    return [path for path, _ in flat]


def as_array(value: Any) -> Any:
    """An array of what upstream takes in its place: a number, or NumPy's arrays."""
    is_convertible = isinstance(value, (int, float)) or hasattr(value, "__array__")
    is_array = isinstance(value, mx.array)
    return mx.array(value) if is_convertible and not is_array else value


def measure(
    gradients: list[mx.array], max_norm: float | mx.array
) -> tuple[mx.array, mx.array]:
    """The global norm of arrays of any dtypes, and the factor that clips it."""
    if any(g.dtype not in FUSED_DTYPES for g in gradients):
        gradients = [mx.abs(g).astype(mx.float32) for g in gradients]
    limit = mx.array(max_norm, mx.float32)
    _, norm, factor = kernels.sums_of_squares(gradients, limit)
    return norm, factor


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
        {options}

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

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        documented(cls)

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
        with self._restored_on_error(model):
            model.update(self._step(gradients, model, None))

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

    @contextmanager
    def _restored_on_error(self, model: Any) -> Iterator[None]:
        undo = self._remember()
        before = kernels.Snapshot(model)
        try:
            yield
        except BaseException:
            undo()
            before.restore()
            raise

    def _remember(self) -> Callable[[], None]:
        """What undoes every change of the optimizer's state from now on."""
        was_initialized = self._initialized
        before = kernels.Snapshot(self.state)

        def undo() -> None:
            before.restore()
            self._initialized = was_initialized

        return undo

    def _step(self, gradients: Any, parameters: Any, clip: Clip | None) -> Any:
        """One step; clip is given where it was measured over more than these."""
        if not self._initialized:
            self.init(gradients)
        leaves = kernels.Leaves(gradients, parameters, self.state)
        for name, schedule in self._schedulers.items():
            self.state[name] = self._scheduled(name, schedule(self.step))
        if clip is None:
            clip = self._measure(leaves)
            self._record(clip)
        step = self.step + 1
        if clip.skip is not None:
            step = mx.where(clip.skip, self.step, step)
        self.state["step"] = step
        return self._apply_leaves(leaves, clip)

    def _record(self, clip: Clip) -> None:
        state = self.state
        if clip.norm is not None:
            state["grad_norm"] = clip.norm
        if clip.skip is not None:
            state["skipped_steps"] = state["skipped_steps"] + clip.skip

    def _scheduled(self, name: str, value: Any) -> Any:
        if isinstance(value, mx.array) and value.size != 1:
            raise ValueError(
                f"[{type(self).__name__}] the schedule of {name} gave an array of "
                f"shape {value.shape}; expected a scalar"
            )
        # A Python number too: upstream takes only arrays.
        return value if isinstance(value, mx.array) else mx.array(value, mx.float32)

    def _measure(self, leaves: Leaves) -> Clip:
        if not self._needs_norm():
            return Clip()
        if leaves.dtypes() is None:
            raise self._bad_gradient(leaves)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm, factor = measure(leaves.gradients, limit)
        return Clip(
            norm,
            None if self.max_grad_norm is None else factor,
            ~mx.isfinite(norm) if self.skip_nonfinite else None,
        )

    def _bad_gradient(self, leaves: Leaves) -> TypeError:
        path, gradient = next(
            (path, gradient)
            for path, gradient in zip(paths(leaves.tree), leaves.gradients, strict=True)
            if not isinstance(gradient, mx.array)
        )
        return TypeError(
            f"[{type(self).__name__}] the gradient of '{path}' is of type "
            f"{type(gradient).__name__}; expected an mx.array"
        )

    def _apply_leaves(self, leaves: Leaves, clip: Clip) -> Any:
        """The updated parameters' tree; states get their new entries."""
        named = zip(
            paths(leaves.tree),
            leaves.gradients,
            leaves.parameters,
            leaves.states,
            strict=True,
        )
        return leaves.replace([self._apply_one(*leaf, clip) for leaf in named])

    def _apply_one(
        self, path: str, gradient: Any, parameter: Any, state: Any, clip: Clip
    ) -> Any:
        """The updated parameter, by the user's apply_single."""
        if clip.scale is not None:
            gradient = (gradient * clip.scale).astype(gradient.dtype)
        if clip.skip is None:
            return self.apply_single(gradient, parameter, state)
        before = dict(state)
        updated = self.apply_single(gradient, parameter, state)
        for key, value in before.items():
            state[key] = mx.where(clip.skip, value, state[key])
        return mx.where(clip.skip, parameter, updated)


documented(Optimizer)


class FusedOptimizer(Optimizer):
    """An optimizer whose update is a rule of ``metal/update_rules.h``.

    A class names its rule in ``rule``; the rule's hyper-parameters are attributes of
    its instances, or what ``_hyperparameters`` returns, and the rule's states are the
    entries of a parameter's state. One of ``mlx.optimizers`` lists upstream's class as
    its second base, which gives the constructor's checks and ``init_single``.

    Args:
        learning_rate (float or callable): The learning rate.
        **options: As of the optimizers of this package.
    """

    rule: ClassVar[str]
    state_dtype: mx.Dtype | None = None
    weight_decay_filter: WeightDecayFilter | None = None
    # Whether the parameter decays for which a user's apply_single runs.
    _decays: bool = True

    def __init__(
        self, learning_rate: LearningRate, **options: Unpack[DecayOptions]
    ) -> None:
        stock.Optimizer.__init__(self)
        self._maybe_schedule("learning_rate", learning_rate)
        self._set_options(**options)

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
        inherited = super().init_single
        if getattr(inherited, "__func__", None) is stock.Optimizer.init_single:
            for key in kernels.states(self._rule()):
                state[key] = mx.zeros_like(parameter)
        else:
            inherited(parameter, state)
        for key, value in state.items():
            state[key] = self._cast(value)

    def _cast(self, value: mx.array) -> mx.array:
        if self.state_dtype is None or value.dtype == self.state_dtype:
            return value
        return value.astype(self.state_dtype)

    def _rule(self) -> str:
        """The rule's name, which may depend on arguments."""
        return self.rule

    def _hyperparameters(self) -> dict[str, Any]:
        """The values of the rule's hyper-parameters."""
        names = kernels.hyperparameters(self._rule())
        return {name: getattr(self, name) for name in names}

    def _sets(self, leaves: Leaves) -> tuple[list[dict[str, Any]], list[int] | None]:
        """Sets of hyper-parameters, and which each leaf has; None if all the first."""
        usual = self._hyperparameters()
        undecayed = {**usual, "weight_decay": 0.0}
        if self.weight_decay_filter is None or "weight_decay" not in usual:
            return [usual], None
        if isinstance(leaves.tree, mx.array):  # apply_single's only one
            return [usual if self._decays else undecayed], None
        named = zip(paths(leaves.tree), leaves.parameters, strict=True)
        decays = [bool(self.weight_decay_filter(*leaf)) for leaf in named]
        return [usual, undecayed], [0 if x else 1 for x in decays]

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
        leaves = kernels.Leaves(gradient, parameter, state)
        self._update_leaves(leaves, Clip())
        updated: mx.array = leaves.commit()
        return updated

    def _apply_leaves(self, leaves: Leaves, clip: Clip) -> Any:
        apply_single = getattr(self.apply_single, "__func__", None)
        if apply_single is not FusedOptimizer.apply_single:  # a user's own
            return super()._apply_leaves(leaves, clip)
        try:
            self._update_leaves(leaves, clip)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self._explain(error, leaves)
            raise
        return leaves.commit()

    def _apply_one(
        self, path: str, gradient: Any, parameter: Any, state: Any, clip: Clip
    ) -> Any:
        if self.weight_decay_filter is not None:
            self._decays = bool(self.weight_decay_filter(path, parameter))
        try:
            return super()._apply_one(path, gradient, parameter, state, clip)
        finally:
            self._decays = True

    def _update_leaves(self, leaves: Leaves, clip: Clip) -> None:
        """Compute what becomes of the leaves; nothing is changed yet."""
        sets, set_of = self._sets(leaves)
        self._run(
            leaves,
            self._rule(),
            sets,
            sets=set_of,
            learning_rate=as_array(self.state.get("learning_rate")),
            gradient_scale=clip.scale,
            skip=clip.skip,
        )

    def _run(
        self, leaves: Leaves, rule: str, hyperparameters: Any, **rest: Any
    ) -> None:
        """Update leaves by a rule."""

        def run() -> bool:
            return leaves.update(
                rule,
                hyperparameters,
                step=as_array(self.step),
                **{"state_dtype": self.state_dtype, **rest},
            )

        if run():
            return
        for i, (parameter, state) in enumerate(
            zip(leaves.parameters, leaves.states, strict=True)
        ):
            leaves.set_parameter(i, as_array(parameter))
            for key in kernels.states(rule):
                state[key] = as_array(state[key])
        if not run():
            raise TypeError(f"[{type(self).__name__}] expected trees of arrays")

    def _explain(self, error: Exception, leaves: Leaves) -> None:
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
