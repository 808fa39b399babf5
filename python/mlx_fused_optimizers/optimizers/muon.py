"""Muon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.optimizers as stock

from .base import Clip, LearningRate
from .fused import FusedOptimizer
from .matrices import refuse_complex
from .options import FUSED_DTYPES, check_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._ext import Leaves
    from .options import DecayOptions

Triple = tuple[float, float, float]

# The coefficients of an odd polynomial of degree five: a x + b x^3 + c x^5.
JORDAN: Triple = (3.4445, -4.7750, 2.0315)

# Amsel et al., arXiv:2505.16932, algorithm 1: the best polynomials one after the other
# for singular values from 1e-3 to 1, for which the last repeats.
POLAR_EXPRESS: list[Triple] = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
# By this much a singular value may be rounded past 1; the last polynomial bears it.
SAFETY = 1.01

# By what the learning rate of a matrix is multiplied, by the names of torch.optim.Muon.
ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "spectral_unclamped": lambda rows, columns: (rows / columns) ** 0.5,
}

# Elements of the matrices that are made orthogonal together, at most: more are no
# faster, and their products need several times as much memory.
LARGEST_BATCH = 1 << 22


class Muon(FusedOptimizer, stock.Muon):
    r"""The Muon optimizer: momentum, made orthogonal by Newton-Schulz iterations.

    .. math::

        g_t &\leftarrow g_t + \eta w_t \\
        v_{t+1} &= \mu v_t + (1 - \mu) g_t \\
        u_{t+1} &= \text{NS}((1 - \mu) g_t + \mu v_{t+1}) \\
        w_{t+1} &= w_t - \lambda \sqrt{\max(1, \text{rows} / \text{columns})}\, u_{t+1}

    Without Nesterov momentum, NS takes :math:`v_{t+1}`; of a matrix :math:`X`, divided
    by its Frobenius norm, each iteration makes :math:`a X + b X X^T X + c (X X^T)^2 X`.
    The moment update and the write of the parameter are a kernel each, in place. The
    products are MLX's, over matrices of one shape together, up to a sixth of all
    elements. The norm is computed in float32, and so are on the CPU the products of
    half precision. Source: Jordan et al., "Muon: An optimizer for hidden layers in
    neural networks", 2024, https://kellerjordan.github.io/posts/muon/.

    Embeddings, the last layer and parameters of fewer than two dimensions are better
    left to another optimizer, see :class:`MultiOptimizer`. A convolution's filters are
    flattened to matrices, ``(filters, all else)``, for NS; rows and columns in the
    formula above are nevertheless the last two dimensions, as in ``mlx.optimizers``,
    unless ``matrix_scale`` is set.

    State of a parameter: ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        momentum (float, optional): The momentum strength :math:`\mu`.
            Default: ``0.95``
        weight_decay (float, optional): The weight decay :math:`\eta`: an L2 penalty,
            or decoupled, see below. Default: ``0.01``
        nesterov (bool, optional): Enables Nesterov momentum. Default: ``True``
        ns_steps (int, optional): Newton-Schulz iterations. Default: ``5``
        ns_coefficients (tuple, sequence of tuples or str, optional): :math:`(a, b, c)`
            of all iterations, or of each, of which the last repeats; or
            ``"polar_express"``, the polynomials of Amsel et al., "The Polar Express",
            arXiv:2505.16932, which bring singular values closer to 1.
            Default: ``(3.4445, -4.7750, 2.0315)``
        decoupled_weight_decay (bool, optional): Decay as AdamW does,
            :math:`w_{t+1} = (1 - \lambda \eta) w_t - \ldots`, instead of by the
            gradient, of which NS keeps but the direction. Default: ``False``
        matrix_scale (bool, optional): Take rows and columns of a filter from the matrix
            that it is flattened to. Default: ``False``
        adjust_lr_fn (str, optional): By what the learning rate of a matrix is
            multiplied: ``"original"``, :math:`\sqrt{\max(1, \text{rows} /
            \text{columns})}` as above; ``"match_rms_adamw"``,
            :math:`0.2 \sqrt{\max(\text{rows}, \text{columns})}`, for learning rates
            and decay that were found for AdamW (Liu et al., "Muon is scalable for LLM
            training", arXiv:2502.16982); ``"spectral_unclamped"``,
            :math:`\sqrt{\text{rows} / \text{columns}}`. Default: ``"original"``
        {options}

    Raises:
        ValueError: If ``max_grad_norm`` is negative, ``ns_coefficients`` are none, or
            ``adjust_lr_fn`` is another.
        TypeError: In a step, if a matrix is complex.
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Triple | Sequence[Triple] | str = JORDAN,
        decoupled_weight_decay: bool = False,
        matrix_scale: bool = False,
        adjust_lr_fn: str = "original",
        **options: Unpack[DecayOptions],
    ) -> None:
        check_numbers(self, momentum=momentum, weight_decay=weight_decay)
        stock.Muon.__init__(
            self, learning_rate, momentum, weight_decay, nesterov, ns_steps
        )
        _polynomials(ns_coefficients)  # raises for what is none
        # Only then, so that checkpoints stay those of mlx.optimizers by default.
        if ns_coefficients != JORDAN:
            self.ns_coefficients = ns_coefficients
        if adjust_lr_fn not in ADJUST_LR:
            raise ValueError(
                f"adjust_lr_fn should be {' or '.join(map(repr, ADJUST_LR))}, "
                f"{adjust_lr_fn!r} was provided instead"
            )
        if adjust_lr_fn != "original":
            self.adjust_lr_fn = adjust_lr_fn
        self.decoupled_weight_decay = decoupled_weight_decay
        self.matrix_scale = matrix_scale
        self._set_options(**options)

    rule = "MuonMoment"
    takes_whole = True
    ns_coefficients: Triple | Sequence[Triple] | str = JORDAN
    adjust_lr_fn: str = "original"

    def _group_arguments(self) -> set[str]:
        # The iterations take matrices of several groups together.
        return {"learning_rate", *self._hyperparameters()}

    def _update_leaves(self, leaves: Leaves, clip: Clip) -> None:
        parameters = leaves.parameters
        name = type(self).__name__
        refuse_complex(name, leaves.tree, parameters, leaves.gradients, 2)
        arguments = self._arguments(leaves, self.state["learning_rate"])
        sets = arguments.sets
        set_of = arguments.set_of or [0] * len(parameters)
        decays = [sets[number]["weight_decay"] for number in set_of]
        if self.decoupled_weight_decay:
            sets = [{**values, "weight_decay": 0.0} for values in sets]
        # The iterations need many times a matrix' memory: a batch begins when the one
        # before has ended. Gradients are ready from the last layer to the first.
        after: list[mx.array] = []
        for batch in _batches(parameters):
            dtypes = [leaves.gradients[i].dtype for i in batch]
            state_dtype = self._widen(leaves, batch)
            # This rule turns the gradient into the direction.
            self._run(
                leaves,
                self.rule,
                sets,
                sets=arguments.sets_of(batch),
                gradient_scale=clip.scale,
                skip=clip.skip,
                indices=batch,
                after=after,
                state_dtype=state_dtype,
            )
            gradients = leaves.gradients
            products = mx.float16 if {*dtypes} == {mx.float16} else mx.float32
            directions = self._orthogonalized([gradients[i] for i in batch], products)
            for i, direction, dtype in zip(batch, directions, dtypes, strict=True):
                if dtype == parameters[i].dtype == mx.float16:
                    direction = direction.astype(dtype)
                leaves.set_gradient(i, direction)
            stretches = [self._stretch(parameters[i]) for i in batch]
            # The write multiplies decay by the stretched rate.
            decay = [
                {"weight_decay": decays[i] / x if self.decoupled_weight_decay else 0.0}
                for i, x in zip(batch, stretches, strict=True)
            ]
            self._run(
                leaves,
                "SGD",
                decay,
                sets=[*range(len(batch))],
                learning_rate=arguments.rates_of(batch) * mx.array(stretches),
                per_tensor=True,
                skip=clip.skip,
                indices=batch,
            )
            after = [leaves.parameters[batch[-1]]]

    def _widen(self, leaves: Leaves, batch: list[int]) -> mx.Dtype | None:
        """Make float16 gradients of matrices float32; the dtype of the batch's state.

        A direction is of the gradient's dtype, and much smaller: in float16 that of
        gradients near 1e-6 is lost before NS makes it orthogonal, whatever its scale.
        """
        parameters, gradients = leaves.parameters, leaves.gradients
        usual = self._plain_dtype()
        moments = {
            leaves.states[i]["v"].dtype for i in batch if "v" in leaves.states[i]
        }
        known = (mx.float16, mx.float32)
        if (
            (len(moments) > 1 and usual is None)
            or any(dtype not in known for dtype in moments)
            or any(parameters[i].dtype not in known for i in batch)
            or any(parameters[i].ndim < 2 for i in batch)
            or any(gradients[i].dtype != mx.float16 for i in batch)
        ):
            return usual
        for i in batch:
            leaves.set_gradient(i, gradients[i].astype(mx.float32))
        return usual or next(iter(moments), mx.float32)

    def _stretch(self, parameter: mx.array) -> float:
        """The factor of the learning rate, by the matrix' shape."""
        if parameter.ndim < 2 or parameter.size == 0:
            return 1.0
        rows, columns = parameter.shape[-2:]
        if self.matrix_scale:
            rows = parameter.shape[0]
            columns = parameter.size // rows
        return ADJUST_LR[self.adjust_lr_fn](rows, columns)

    def _orthogonalized(
        self, directions: list[mx.array], products: mx.Dtype
    ) -> list[mx.array]:
        """Of a batch: matrices of one size, or what stays as it is.

        A float32 direction of float16 gradients has products of their dtype.
        """
        if directions[0].ndim < 2 or directions[0].size == 0:
            return directions
        matrices = [_wide(x) for x in directions]
        batch = mx.stack(matrices) if len(matrices) > 1 else matrices[0][None]
        is_single = batch.dtype == mx.float32
        batch = self._newton_schulz(batch, products if is_single else batch.dtype)
        # Slices are views, where indexing with a number would copy.
        parts = [batch[i : i + 1].squeeze(0) for i in range(len(directions))]
        return [
            (x.T if _is_tall(like) else x).reshape(like.shape)
            for x, like in zip(parts, directions, strict=True)
        ]

    def _newton_schulz(self, x: mx.array, products: mx.Dtype) -> mx.array:
        dtype = x.dtype
        # On the CPU MLX has no fast products of half precision.
        on_cpu = mx.default_device() == mx.cpu
        working = mx.float32 if on_cpu and dtype in FUSED_DTYPES else products
        polynomials, safety = _polynomials(self.ns_coefficients)
        if dtype in FUSED_DTYPES:
            x = x.astype(mx.float32)
        # First by a power of two near the largest, so that no square overflows.
        axes = (-2, -1)
        largest = mx.maximum(
            mx.max(x, axis=axes, keepdims=True), -mx.min(x, axis=axes, keepdims=True)
        )
        exponent = mx.floor(mx.log2(mx.maximum(largest, 1e-30)))
        scale = mx.stop_gradient(mx.power(2.0, exponent))
        x = x / scale
        norm = mx.sqrt(mx.sum(mx.square(x), axis=axes, keepdims=True))
        x = (x / (norm * safety + 1e-7 / scale)).astype(working)
        for step in range(self.ns_steps):
            a, b, c = polynomials[min(step, len(polynomials) - 1)]
            gram = x @ x.swapaxes(-1, -2)
            factor = mx.addmm(gram, gram, gram, beta=b, alpha=c)
            x = mx.addmm(x, factor, x, beta=a)
        return x.astype(dtype)


def _polynomials(
    coefficients: Triple | Sequence[Triple] | str,
) -> tuple[Sequence[Any], float]:
    """Coefficients of each iteration, the last of which repeats; the norm's safety."""
    if isinstance(coefficients, str):
        if coefficients != "polar_express":
            raise ValueError(
                'ns_coefficients should be triples or "polar_express", '
                f'"{coefficients}" was provided instead'
            )
        safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS]
        return [*safe[:-1], POLAR_EXPRESS[-1]], SAFETY
    triples: Any = [*coefficients]
    if triples and all(isinstance(x, (int, float)) for x in triples):
        triples = [triples]
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError(
            'ns_coefficients should be triples or "polar_express", '
            f"{coefficients} was provided instead"
        )
    return triples, 1.0


def _matrix_shape(x: mx.array) -> tuple[int, int]:
    return x.shape[0], x.size // x.shape[0]


def _is_tall(x: mx.array) -> bool:
    rows, columns = _matrix_shape(x)
    return rows > columns


def _wide(x: mx.array) -> mx.array:
    """The matrix with no more rows than columns."""
    x = x.reshape(_matrix_shape(x))
    return x.T if _is_tall(x) else x


def _batches(parameters: list[mx.array]) -> Iterator[list[int]]:
    """Which are updated together, from the last to the first."""
    largest = min(LARGEST_BATCH, sum(p.size for p in parameters) // 6)
    open_batches: dict[Any, list[int]] = {}
    for i in reversed(range(len(parameters))):
        parameter = parameters[i]
        key: Any = None
        if parameter.ndim >= 2 and parameter.size > 0:
            key = (*sorted(_matrix_shape(parameter)), parameter.dtype)
        batch = open_batches.setdefault(key, [])
        batch.append(i)
        size = math.prod(key[:2]) if key else parameter.size
        if (len(batch) + 1) * size > largest:
            yield open_batches.pop(key)
    yield from open_batches.values()
