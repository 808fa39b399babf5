"""ShardedOptimizer."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
from mlx.utils import tree_flatten

from .. import checkpoint
from .._kernels import kernels
from .._version import __version__
from ..optimizers.base import (
    INIT,
    Optimizer,
    as_array,
    check_given,
    check_tree,
    parts_of,
    paths,
)
from ..optimizers.fused import FusedOptimizer
from ..optimizers.multi import MultiOptimizer
from ..shards import shards_of_model
from .known import Known
from .layout import Bucket, Tensor, buckets_of, runs_of
from .ranks import Ranks, RanksDifferError
from .whole import (
    States,
    gathered_states,
    local_state,
    own_entries,
    single_parts,
    states_of,
    whole_optimizer,
)

if TYPE_CHECKING:
    from .._ext import Leaves

State = dict[str, Any]

REFUSALS = (AttributeError, KeyError, TypeError, ValueError)

MODES = ("local", "averaged")
LARGEST_BUCKET = 1 << 30  # jaccl counts bytes in 32 bits

# What an elementwise optimizer leaves as it is.
OWN_MATH = ("apply_gradients", "apply_single", "init_single", "_update_leaves")


def is_elementwise(optimizer: stock.Optimizer) -> bool:
    """Whether an optimizer updates each element by itself, wherever it is."""
    return (
        isinstance(optimizer, FusedOptimizer)
        and not optimizer.takes_whole
        and all(
            getattr(type(optimizer), name) is getattr(FusedOptimizer, name)
            and name not in vars(optimizer)
            for name in OWN_MATH
        )
    )


def part_of(optimizer: stock.Optimizer, path: str, array: mx.array) -> stock.Optimizer:
    """The part that a parameter goes to."""
    while isinstance(optimizer, stock.MultiOptimizer):
        pairs = zip(optimizer.optimizers, optimizer.filters, strict=True)
        optimizer = next(part for part, takes in pairs if takes(path, array))
    return optimizer


def sums_of_bits(parameters: Any) -> list[Any]:
    """What differs where the values of parameters do."""
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    flat: Any = tree_flatten(parameters)
    views = [
        mx.view(x.reshape(-1), unsigned[x.dtype.size], stream=mx.cpu) for _, x in flat
    ]
    return [mx.sum(x, stream=mx.cpu).item() if x.size > 0 else 0 for x in views]


def evaluate(tree: Any) -> bool:
    """Evaluate arrays; False inside of MLX's transformations, where nothing can be."""
    try:
        mx.eval(tree)
    except ValueError as error:
        if "transformation" not in str(error):
            raise
        return False
    return True


class ShardedOptimizer(stock.Optimizer):
    r"""An optimizer of which each rank of ``mx.distributed`` has a part.

    It takes the place of ``nn.average_gradients`` and ``update``: of N ranks that each
    have the whole model and gradients of their own, each sums 1/N of the gradients,
    holds 1/N of the optimizer's state, updates 1/N of the parameters, and gets the
    others from the other ranks. The numbers are those of one process that takes the
    mean of the ranks' gradients. Source: Rajbhandari et al., "ZeRO: Memory
    optimizations toward training trillion parameter models", SC 2020, stages 1 and 2.

    Of an optimizer that updates each element by itself, tensors are laid out one after
    the other in buckets, and each is cut into N rows. Muon, Adafactor and optimizers
    that are not of this package have whole tensors, each on one rank.

    ``init`` compares the parameters, the configuration and the versions of all ranks,
    and each step the gradients' paths and dtypes, step counts and learning rates. When
    a rank dies, the others raise a ``RuntimeError`` that names the step; their
    parameters are those before it or after it. The optimizer's state is then lost:
    start again from the last checkpoint. Any later call on that group raises at once.

    Under ``mx.compile`` (call ``init`` before) all of this is part of the caller's
    ``mx.eval``, which may wait for ever when a rank dies, and changes parameters
    before it does. Use :meth:`wait` in its place, with ``timeout``; better, compile the
    loss and its gradients alone.

    What an optimizer does with a whole model beside its steps, as the averages of
    schedule-free ones, is for :meth:`gathered`.

    State of a parameter: what the optimizer holds of this rank's piece, under the
    parameter's path. :func:`save` writes the file of one process, byte for byte, and
    :func:`load` takes it on any number of ranks.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> optimizer = optim.ShardedOptimizer(optim.AdamW(1e-3, max_grad_norm=1.0))
        >>> optimizer.init(model.trainable_parameters())
        >>> loss = nn.value_and_grad(model, lambda x: model(x).mean())
        >>> _, gradients = loss(mx.ones((2, 4)))
        >>> optimizer.update(model, gradients)

    Args:
        optimizer (mlx.optimizers.Optimizer): The optimizer, whose options are those of
            all ranks together: norms, skips and random bits are the same on each.
        group (mx.distributed.Group, optional): The ranks. Default: all
        bucket_size (int, optional): Bytes of gradients that are sent together; the
            memory of a step beyond gradients, state and both generations of
            parameters is about two of them. Default: ``33554432``
        gradients (str, optional): ``"local"``: the gradients are each rank's own, and
            the step takes their mean. ``"averaged"``: they are equal on all ranks, as
            after ``nn.average_gradients``. Default: ``"local"``
        timeout (float, optional): Seconds that a rank waits for the others; then it
            writes a message and ends its process with exit code 75, as MLX cannot be
            interrupted there. Default: ``None``, it waits for ever

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        optimizer: stock.Optimizer,
        group: mx.distributed.Group | None = None,
        bucket_size: int = 32 << 20,
        gradients: Literal["local", "averaged"] = "local",
        timeout: float | None = None,
    ) -> None:
        if not isinstance(optimizer, stock.Optimizer):
            raise TypeError(
                f"optimizer is of type {type(optimizer).__name__}; expected an "
                "mlx.optimizers.Optimizer"
            )
        for part in parts_of(optimizer):
            if isinstance(part, ShardedOptimizer):
                raise TypeError("optimizer is sharded already, or has a part that is")
            is_multi = isinstance(part, stock.MultiOptimizer)
            if is_multi and not isinstance(part, MultiOptimizer):
                raise TypeError(
                    f"optimizer is or has a {type(part).__module__}.MultiOptimizer, "
                    "which takes no pieces; expected that of mlx_fused_optimizers, "
                    "whose parts may be of mlx.optimizers"
                )
        if group is not None and not isinstance(group, mx.distributed.Group):
            raise TypeError(
                f"group is of type {type(group).__name__}; expected an "
                "mx.distributed.Group"
            )
        if not isinstance(bucket_size, int):
            raise TypeError(
                f"bucket_size is of type {type(bucket_size).__name__}; expected bytes"
            )
        if not 0 < bucket_size <= LARGEST_BUCKET:
            raise ValueError(
                f"bucket_size should be in [1, {LARGEST_BUCKET}], {bucket_size} was "
                "provided instead"
            )
        if gradients not in MODES:
            raise ValueError(
                f"gradients should be {' or '.join(map(repr, MODES))}, {gradients!r} "
                "was provided instead"
            )
        if timeout is not None and not isinstance(timeout, (int, float)):
            raise TypeError(
                f"timeout is of type {type(timeout).__name__}; expected seconds"
            )
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout should be >0, {timeout} was provided instead")
        self.optimizer = optimizer
        self.bucket_size = bucket_size
        self.gradients = gradients
        self._ranks = Ranks(group, timeout)
        self._take([])

    # What is the optimizer's

    @property
    def state(self) -> Any:
        """This rank's state: the optimizer's own entries, and its pieces' states."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def step(self) -> Any:
        """The step count; of a MultiOptimizer that of its first optimizer."""
        return self._parts[0].step

    @property
    def learning_rate(self) -> Any:
        """The learning rate; assign the same on all ranks."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.optimizer.learning_rate = learning_rate

    @property
    def grad_norm(self) -> mx.array | None:
        """The global norm of the last step's mean gradients, as of the optimizer."""
        norm: mx.array | None = self.state.get("grad_norm")
        return norm

    @property
    def skipped_steps(self) -> mx.array | None:
        """Steps skipped, as of the optimizer."""
        skipped: mx.array | None = self.state.get("skipped_steps")
        return skipped

    # Layout

    def init(self, parameters: Any) -> None:
        """Initialize the state of this rank's pieces; to be called on all ranks.

        The first step does it too. Needed before ``mx.compile`` captures the state, and
        when the model has changed.

        Args:
            parameters (dict): A Python tree of the whole parameters.

        Raises:
            TypeError: If ``parameters`` is no dict or a leaf is no array.
            ValueError: If a parameter has the name of an entry of the state, or if the
                ranks differ in parameters, configuration or versions; on all ranks.
            RuntimeError: If a rank is lost.
        """
        if self._ranks.size == 1:
            self.optimizer.init(parameters)
            return
        with self._ranks.doing("init"):
            self._init(parameters)

    def _init(
        self,
        parameters: Any,
        problem: Exception | None = None,
        compares_values: bool = True,
    ) -> None:
        tensors: list[Tensor] = []
        lines: list[str] = []
        try:
            if problem is None:
                check_tree("parameters", parameters)
                self._check_names(parameters)
                tensors = self._tensors_of(parameters)
                sums = sums_of_bits(parameters) if compares_values else None
                lines = self._description(tensors, sums)
        except REFUSALS as error:
            problem = error
        self._ranks.agree(lines, problem)
        self._ranks.is_scattering()
        if self._tensors and tensors != self._tensors:
            self._move(tensors)
        self._take(tensors)
        leaves = kernels.Leaves(parameters, what="value")
        numbers = range(len(leaves))
        with self._with(Known(self, numbers, leaves.gradients, False)):
            self.optimizer.init(self._pieces_of(numbers, leaves.gradients))

    def _check_names(self, parameters: dict[str, Any]) -> None:
        """Refuse what one process would: here each rank has some of the names."""
        for part in self._parts:
            for name in parameters:
                if isinstance(part, Optimizer) and name in own_entries(part.state):
                    raise part._is_taken(name)

    def _tensors_of(self, parameters: Any) -> list[Tensor]:
        leaves = kernels.Leaves(parameters, what="value")
        tensors = []
        for path, array in zip(paths(parameters), leaves.gradients, strict=True):
            part = part_of(self.optimizer, path, array)
            number = next(i for i, x in enumerate(self._parts) if x is part)
            is_flat = is_elementwise(part)
            tensors.append(Tensor(path, array.shape, array.dtype, number, is_flat))
        return tensors

    def _description(self, tensors: list[Tensor], sums: list[Any] | None) -> list[str]:
        """What has to be the same on all ranks."""
        settings = checkpoint.settings_of(self.optimizer)
        return [
            f"mlx_fused_optimizers {__version__}",
            f"MLX {cast(Any, mx).__version__}",
            f"bucket_size {self.bucket_size}",
            f"gradients {self.gradients!r}",
            *(f"configuration {name!r}: {x}" for name, x in settings.items()),
            *(
                f"parameter {x.path!r}: {x.dtype} {x.shape}, of optimizer {x.part}"
                + ("" if sums is None else f", bits that sum to {sums[i]}")
                for i, x in enumerate(tensors)
            ),
        ]

    def _take(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._buckets = buckets_of(tensors, self._ranks.size, self.bucket_size)
        rank = self._ranks.rank
        self._mine = [piece for bucket in self._buckets for piece in bucket.rows[rank]]

    def _move(self, tensors: list[Tensor]) -> None:
        """Give other pieces the states of what is still there."""
        before = {(tensor.path, tensor.shape) for tensor in self._tensors}
        states = gathered_states(self._parts, self._ranks, self._tensors, self._mine)
        self._take(tensors)
        kept = {x.path: states[x.path] for x in tensors if (x.path, x.shape) in before}
        for part, local in zip(self._parts, self._local_states(kept), strict=True):
            own = own_entries(part.state)
            part.state.clear()
            part.state.update({**own, **local})

    def _local_states(self, states: States) -> list[State]:
        """Of each part, the states of this rank's pieces."""
        found: list[State] = [{} for _ in self._parts]
        for piece in self._mine:
            tensor = self._tensors[piece.tensor]
            if tensor.path in states:
                local = local_state(states[tensor.path], piece)
                found[tensor.part][piece.key] = local
        return found

    @property
    def _parts(self) -> list[stock.Optimizer]:
        return single_parts(self.optimizer)

    def _pieces_of(
        self, numbers: Sequence[int], arrays: Sequence[mx.array]
    ) -> dict[str, mx.array]:
        """This rank's pieces of whole arrays of tensors of these numbers."""
        array_of = dict(zip(numbers, arrays, strict=True))
        return {
            piece.key: piece.of(array_of[piece.tensor])
            for piece in self._mine
            if piece.tensor in array_of
        }

    @contextmanager
    def _with(self, known: Known) -> Iterator[None]:
        """Let the optimizer ask for what its pieces do not tell."""
        parts = [x for x in parts_of(self.optimizer) if isinstance(x, Optimizer)]
        for part in parts:
            part._known = known
        try:
            yield
        finally:
            for part in parts:
                part._known = None

    # The step

    def update(self, model: Any, gradients: Any) -> None:
        """Apply the gradients of all ranks to the parameters and update the model.

        To be called on all ranks, with gradients of the same paths, shapes and dtypes.

        Args:
            model (mlx.nn.Module): The model, the same on all ranks.
            gradients (dict): A Python tree of gradients, as of
                ``mlx.nn.value_and_grad``.

        Raises:
            KeyError: If a gradient has no parameter or no state.
            TypeError: If ``gradients`` is no dict, or a gradient or parameter no array.
            ValueError: If shapes do not fit, or another rank's gradients are others; or
                if parameters are shards, as of ``nn.fully_shard``.
            RuntimeError: If a rank is lost, or was lost before.
        """
        check_given("model", model)
        if self._ranks.size == 1:
            self.optimizer.update(model, gradients)
        else:
            model.update(self._step(gradients, model))

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Apply the gradients of all ranks and return the updated parameters.

        Args:
            gradients (dict): A Python tree of gradients.
            parameters (dict): A Python tree of parameters, the same on all ranks. It
                can be a superset of the gradients.

        Returns:
            dict: The updated parameters, in a tree of the gradients' structure.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: As of :meth:`update`.
        """
        check_given("parameters", parameters)
        if self._ranks.size == 1:
            return self.optimizer.apply_gradients(gradients, parameters)
        return self._step(gradients, parameters)

    def wait(self, *arrays: Any) -> None:
        """As ``mx.eval``, for what a compiled step returns: with ``timeout``.

        Raises:
            RuntimeError: If a rank is lost, or was lost before.
        """
        if self._ranks.size == 1:
            mx.eval(*arrays)
            return
        with self._ranks.doing("a compiled step", is_lazy=True):
            self._ranks.wait(*arrays)

    def _step(self, gradients: Any, parameters: Any) -> Any:
        ranks = self._ranks
        ranks.check()
        is_lazy = not evaluate(gradients)
        count = "a compiled step" if is_lazy else f"step {int(self.step) + 1}"
        with ranks.doing(count, is_lazy):
            leaves: Any = None
            problem: Exception | None = None
            try:
                check_tree("gradients", gradients)
                leaves = kernels.Leaves(gradients, parameters)
                self._refuse_shards(parameters, gradients)
            except REFUSALS as error:
                problem = error
            if not self._tensors and not is_lazy:
                whole = None if leaves is None else leaves.replace(leaves.parameters)
                self._init(whole, problem)
            numbers: list[int] = []
            try:
                numbers = [] if leaves is None else self._numbers_of(leaves)
            except REFUSALS as error:
                problem = problem or error
            if is_lazy and problem is not None:
                raise problem
            if not is_lazy:
                arrays = leaves.gradients if problem is None else []
                lines = [
                    f"gradient {self._tensors[i].path!r}: {x.dtype}"
                    for i, x in zip(numbers, arrays, strict=True)
                ]
                ranks.agree([*self._entries(), *lines], problem)
            return leaves.replace(self._updated(leaves, numbers, is_lazy))

    def _entries(self) -> list[str]:
        """The step counts, learning rates and so on, which are each rank's own."""
        return [
            f"{name} {as_array(value).tolist()}"
            for part in self._parts
            for name, value in own_entries(part.state).items()
        ]

    def _refuse_shards(self, model: Any, gradients: Any) -> None:
        for path in shards_of_model(model, gradients):
            raise ValueError(
                f"[ShardedOptimizer] '{path}' is a shard already, as of nn.fully_shard "
                "or shard_linear; expected whole parameters on each rank. Each rank's "
                "own optimizer updates shards"
            )

    def _numbers_of(self, leaves: Leaves) -> list[int]:
        """The tensors' numbers, of gradients and parameters that fit them."""
        number_of = {tensor.path: i for i, tensor in enumerate(self._tensors)}
        numbers = []
        for path, gradient, parameter in zip(
            paths(leaves.tree), leaves.gradients, leaves.parameters, strict=True
        ):
            if path not in number_of:
                raise KeyError(
                    f"[ShardedOptimizer] the gradient of '{path}' has no state. When a "
                    f"model has changed, or before mx.compile, call {INIT}"
                )
            tensor = self._tensors[number_of[path]]
            for kind, array in (("gradient", gradient), ("parameter", parameter)):
                if not isinstance(array, mx.array):
                    raise TypeError(
                        f"[ShardedOptimizer] the {kind} of '{path}' is of type "
                        f"{type(array).__name__}; expected an mx.array"
                    )
                if array.shape != tensor.shape:
                    raise ValueError(
                        f"[ShardedOptimizer] the {kind} of '{path}' has shape "
                        f"{array.shape}; expected {tensor.shape}"
                    )
            if parameter.dtype != tensor.dtype:
                raise ValueError(
                    f"[ShardedOptimizer] the parameter '{path}' has dtype "
                    f"{parameter.dtype}; expected {tensor.dtype}. When a model has "
                    f"changed, call {INIT}"
                )
            numbers.append(number_of[path])
        return numbers

    def _updated(
        self, leaves: Leaves, numbers: list[int], is_lazy: bool
    ) -> list[mx.array]:
        """The updated parameters."""
        gradients = self._reduced(numbers, leaves.gradients, is_lazy)
        parameters = leaves.parameters
        dtypes = {x.dtype for x in leaves.gradients}
        undo = Optimizer._remember(cast(Any, self.optimizer))
        problem: Exception | None = None
        updated: dict[str, mx.array] = {}
        try:
            known = Known(self, numbers, parameters, mx.float64 in dtypes)
            updated = self._local_step(
                gradients, self._pieces_of(numbers, parameters), known
            )
        except BaseException as error:
            undo()
            if is_lazy or self._ranks.is_broken or not isinstance(error, Exception):
                raise
            problem = error
        if not is_lazy:
            if isinstance(problem, RanksDifferError):
                raise problem
            self._ranks.agree([], problem)
        # What is still held of gradients and of the state before takes memory.
        del undo, gradients, known
        return self._gathered(numbers, parameters, updated, is_lazy)

    def _reduced(
        self, numbers: list[int], gradients: list[mx.array], is_lazy: bool
    ) -> dict[str, mx.array]:
        """This rank's pieces of the mean gradients."""
        if self.gradients == "averaged":
            return self._pieces_of(numbers, gradients)
        array_of = dict(zip(numbers, gradients, strict=True))
        ranks = self._ranks
        found: dict[str, mx.array] = {}
        for bucket, dtype in self._sent(array_of):
            flat = {i: array_of[i].reshape(-1) for i in bucket.tensors}
            rows = bucket.rows_of(flat, dtype)
            total = None
            if bucket.length > 0:
                total = ranks.row_of_sum(rows) / ranks.size
                if not is_lazy:
                    mx.eval(total)
            for span in bucket.spans():
                if span.row == ranks.rank:
                    piece, end = span.piece, span.offset + span.size
                    shape = self._tensors[piece.tensor].shape
                    part = (
                        flat[piece.tensor]
                        if total is None
                        else total[span.offset : end]
                    )
                    found[piece.key] = part.reshape(shape) if piece.is_whole else part
        return found

    def _sent(self, array_of: dict[int, mx.array]) -> Iterator[tuple[Bucket, mx.Dtype]]:
        """The buckets, as far as there are arrays for them, each of one dtype."""
        for bucket in self._buckets:
            by_dtype: dict[mx.Dtype, list[int]] = defaultdict(list)
            for number in bucket.tensors:
                if number in array_of:
                    by_dtype[array_of[number].dtype].append(number)
            for dtype, chosen in by_dtype.items():
                yield bucket.of_tensors(chosen), dtype

    def _local_step(
        self, gradients: State, parameters: State, known: Known
    ) -> dict[str, mx.array]:
        """This rank's updated pieces."""
        optimizer = self.optimizer
        own = getattr(optimizer.apply_gradients, "__func__", None)
        with self._with(known):
            if isinstance(optimizer, Optimizer) and own is Optimizer.apply_gradients:
                updated = optimizer._step(gradients, parameters, None)
            else:
                updated = optimizer.apply_gradients(gradients, parameters)
        for key, parameter in parameters.items():
            if updated[key].dtype != parameter.dtype:
                raise TypeError(
                    f"[ShardedOptimizer] the update of '{key}' is of dtype "
                    f"{updated[key].dtype}, as its gradient is of dtype "
                    f"{gradients[key].dtype}; expected one that keeps {parameter.dtype}"
                )
        return dict(updated)

    def _gathered(
        self,
        numbers: list[int],
        parameters: list[mx.array],
        updated: dict[str, mx.array],
        is_lazy: bool,
    ) -> list[mx.array]:
        """The parameters, of all ranks' pieces."""
        ranks = self._ranks
        array_of = dict(zip(numbers, parameters, strict=True))
        parts: dict[int, list[tuple[int, mx.array]]] = defaultdict(list)
        for bucket, dtype in self._sent(array_of):
            length = bucket.length
            if length == 0:
                continue
            row = bucket.row(ranks.rank, lambda p: updated.pop(p.key), dtype)
            rows = ranks.all_gather(row)
            del row
            for run in runs_of(bucket):
                part = rows[run.position : run.position + run.size]
                parts[run.tensor].append((run.begin, part))
        result = []
        for number, parameter in zip(numbers, parameters, strict=True):
            found = [x for _, x in sorted(parts[number], key=lambda x: x[0])]
            if not found:  # it has no elements
                result.append(parameter)
                continue
            whole = found[0] if len(found) == 1 else mx.concatenate(found)
            result.append(whole.reshape(parameter.shape))
        if not is_lazy:
            mx.eval(result, self.state)
        return result

    # The whole state

    def gathered(self) -> Any:
        """A copy of the optimizer with the whole state; to be called on all ranks.

        Returns:
            mlx.optimizers.Optimizer: What one process would have. Its arrays take the
            memory of the whole state on each rank.

        Raises:
            RuntimeError: If a rank is lost, or was lost before.
        """
        if self._ranks.size == 1:
            return self.optimizer
        parts = self._parts
        with self._ranks.doing("gathered"):
            states = gathered_states(parts, self._ranks, self._tensors, self._mine)
        return whole_optimizer(self.optimizer, parts, self._tensors, states)

    def _save(self, path: str | os.PathLike[str], model: Any, trainable: bool) -> None:
        if self._ranks.size == 1:
            checkpoint.save(path, model, self.optimizer, trainable)
            return
        ranks, parts = self._ranks, self._parts
        is_first = ranks.rank == 0
        with ranks.doing("save"):
            states = gathered_states(
                parts, ranks, self._tensors, self._mine, keeps=is_first
            )
            problem: Exception | None = None
            if is_first:
                try:
                    whole = whole_optimizer(
                        self.optimizer, parts, self._tensors, states
                    )
                    checkpoint.save(path, model, whole, trainable)
                except Exception as error:
                    problem = error
            ranks.agree([], problem)

    def _load(
        self,
        path: str | os.PathLike[str],
        model: Any,
        strict: bool,
        trainable: bool,
    ) -> None:
        if self._ranks.size == 1:
            checkpoint.load(path, model, self.optimizer, strict, trainable)
            return
        ranks, parts = self._ranks, self._parts
        with ranks.doing("load"):
            if not self._tensors:
                is_module = isinstance(model, nn.Module)
                parameters = model.trainable_parameters() if is_module else model
                self._init(parameters, compares_values=False)
            problem: Exception | None = None
            lines: list[str] = []
            try:
                twin = whole_optimizer(self.optimizer, parts, self._tensors, {})
                fit = checkpoint.fitting(path, model, twin, strict, trainable)
                lines = [f"a file with digest {fit.digest}"]
            except Exception as error:
                problem = error
            ranks.agree(lines, problem)
            local = self._local(fit.state)
            checkpoint.commit(model, fit.parameters, self.optimizer, local)
            fit.warn()

    def _local(self, state: State) -> State:
        """This rank's state, of that of one process."""
        names = [tensor.path for tensor in self._tensors]

        def walk(optimizer: stock.Optimizer, whole: State) -> State:
            if isinstance(optimizer, stock.MultiOptimizer):
                pairs = zip(optimizer.optimizers, whole["states"], strict=True)
                return {**own_entries(whole), "states": [walk(*x) for x in pairs]}
            nodes = {k: v for k, v in whole.items() if k not in own_entries(whole)}
            number = next(i for i, x in enumerate(self._parts) if x is optimizer)
            local = self._local_states(states_of(nodes, names))[number]
            return {**own_entries(whole), **local}

        return walk(self.optimizer, state)
