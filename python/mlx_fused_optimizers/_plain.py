"""What the extension does, by plain MLX operations, where no extension fits.

Of the interface in _ext.pyi. New arrays take the place of what the extension changes in
place; the numbers are those of its plain operations (csrc/graph/composed.cpp).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from ._formats import AVERAGE, BLOCKS, ERRORS, has_shape, is_error, is_half, kind_of
from ._rules import header, number_of, rules

FUSED_DTYPES = {mx.float32, mx.float16, mx.bfloat16}
NO_KERNELS = "no kernels: plain MLX operations are in use"


def is_array_type(type: type) -> bool:
    return type is mx.array


def rule_names() -> list[str]:
    return [*_all_rules()]


def hyperparameters(rule: str) -> list[str]:
    return [*_rule_named(rule).number_names]


def states(rule: str) -> list[str]:
    return [*_rule_named(rule).state_names]


def non_negative(rule: str) -> list[str]:
    return [*_rule_named(rule).non_negative_names]


def encode(
    values: mx.array, storage: str, is_never_negative: bool
) -> tuple[mx.array, mx.array]:
    x = _in_blocks(values.astype(mx.float32), BLOCKS[storage])
    # As the largest of the bits: that of a NaN is the largest.
    sizes = mx.abs(x).view(mx.uint32)
    scales = (mx.max(sizes, axis=-1) if x.size else mx.zeros((0,), mx.uint32)).view(
        mx.float32
    )
    sign = "positive" if is_never_negative else "signed"
    most = _most(storage, is_never_negative)
    stretch = header()[f"stretch_{sign}"](scales[:, None], most)
    bits = "_in_4_bits" if storage == "int4" else ""
    encoded = header()[f"encoded_{sign}{bits}"](x, stretch)
    whole = encoded.reshape(-1)[: values.size]
    if storage == "int8":
        dtype = mx.uint8 if is_never_negative else mx.int8
        return whole.astype(dtype).reshape(values.shape), scales
    pairs = _in_blocks(whole.astype(mx.int8).astype(mx.uint8), 2)
    return (pairs[:, 0] & 15) | ((pairs[:, 1] & 15) << 4), scales


def decode(
    codes: mx.array,
    scales: mx.array,
    shape: Sequence[int],
    storage: str,
    is_never_negative: bool,
) -> mx.array:
    size = math.prod(shape)
    if storage == "int4":
        codes = mx.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)[:size]
        if not is_never_negative:  # the sign of 4 bits
            codes = (codes ^ 8).astype(mx.int8) - 8
    sign = "positive" if is_never_negative else "signed"
    blocks = _in_blocks(codes.astype(mx.float32), BLOCKS[storage])
    most = _most(storage, is_never_negative)
    values = header()[f"decoded_{sign}"](blocks, scales[:, None], most)
    result: mx.array = values.reshape(-1)[:size].reshape(shape)
    return result


def split(values: mx.array, storage: str, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    x = values.astype(mx.float32)
    error = ERRORS[storage]
    if dtype == mx.float16:
        most = 127.0 if error == mx.int8 else 32767.0
        weight, rest = header()["split_float16"](x, _exponents(error), most, 0, 0)
    else:
        weight, rest = header()["split_bfloat16"](x, 0, 0)
        if error == mx.int8:
            rest = header()["shortened"](rest, weight)
    return weight.astype(dtype), rest.view(mx.int32).astype(error)


def join(weights: mx.array, errors: mx.array) -> mx.array:
    wide = weights.astype(mx.float32)
    rest = errors.astype(mx.int32).view(mx.uint32)
    if weights.dtype == mx.float16:
        joined = header()["joined_float16"](wide, rest, _exponents(errors.dtype))
    else:
        unit = 256 if errors.dtype == mx.int8 else 1
        joined = header()["joined_bfloat16"](wide, rest * unit)
    result: mx.array = joined
    return result


def round_stochastically(
    values: mx.array,
    dtype: mx.Dtype,
    seed: mx.array,
    step: mx.array,
    tensor: int,
    first: int = 0,
) -> mx.array:
    end = first + values.size
    numbers = mx.arange(first, end, dtype=mx.uint64).reshape(values.shape)
    key = header()["random_key"](seed.astype(mx.uint32), step.astype(mx.uint32), tensor)
    high, low = (x.astype(mx.uint32) for x in (numbers >> 32, numbers))
    random = header()["random_bits"](key, high, low)
    name = "float16" if dtype == mx.float16 else "bfloat16"
    rounded: mx.array = header()[f"stochastic_{name}"](values, random)
    return rounded.astype(dtype)


def written_slots(rule: str) -> tuple[int, list[int]]:
    is_written = _is_written(_rule_named(rule))
    return len(is_written), [k for k, x in enumerate(is_written) if x]


def sums_of_squares(
    arrays: Sequence[mx.array], max_norm: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    for x in arrays:
        if x.dtype not in FUSED_DTYPES:
            raise ValueError(
                f"[sums_of_squares] an array has dtype {_name(x.dtype)}; expected "
                "float32, float16 or bfloat16."
            )
    limit = _scalar("max_norm", max_norm, 1, mx.float32)
    # Over the largest, so that no square leaves float32.
    largest = mx.array(0.0)
    for x in arrays:
        if x.size > 0:
            largest = mx.maximum(largest, mx.max(mx.abs(x)).astype(mx.float32))
    largest = mx.where(mx.isfinite(largest) & (largest > 0), largest, 1.0)
    sums = [_sum(mx.square(x.astype(mx.float32) / largest)) for x in arrays]
    stacked = mx.stack(sums) if sums else mx.zeros((0,))
    norm = mx.sqrt(_sum(stacked)) * largest
    factor = mx.minimum(limit / (norm + 1e-6), 1.0)
    return stacked * mx.square(largest), norm, factor, norm


def count_nonzero(arrays: Sequence[mx.array]) -> mx.array:
    ones = [(x != 0).astype(mx.float32) for x in arrays]
    return sums_of_squares(ones, mx.array(1.0))[0]


def scale(arrays: Sequence[mx.array], factor: mx.array) -> list[mx.array]:
    leaves = Leaves([*arrays])
    leaves.update("Scale", [{}], gradient_scale=factor)
    return leaves.gradients


class Leaves:
    """The leaves of a step's trees, collected in one walk."""

    def __init__(
        self,
        gradients: Any,
        parameters: Any = None,
        state: Any = None,
        what: str = "gradient",
    ) -> None:
        self.tree = gradients
        self._gradients: list[Any] = []
        self._parameters: list[Any] = []
        self._states: list[Any] = []
        self._changes: list[tuple[int, str, Any]] = []
        self.ema: float | None = None
        self.keep_dtypes = False
        self._collect(gradients, parameters, state, f"the {what}", "")

    def _collect(
        self, gradients: Any, parameters: Any, state: Any, what: str, path: str
    ) -> None:
        if not isinstance(gradients, (dict, list, tuple)):
            leaf = f"{what} of '{path}'" if path else what
            if not isinstance(gradients, mx.array):
                raise TypeError(
                    f"{leaf} is of type {type(gradients).__name__}; expected an "
                    "mx.array"
                )
            if parameters is _NOTHING:
                raise KeyError(f"{leaf} has no parameter")
            if state is not None and not isinstance(state, dict):
                raise KeyError(
                    f"{leaf} has no state. When a model has changed, call "
                    "optimizer.init(model.trainable_parameters())"
                )
            self._gradients.append(gradients)
            self._parameters.append(parameters)
            self._states.append(state)
            return
        pairs: Any = (
            gradients.items() if isinstance(gradients, dict) else enumerate(gradients)
        )
        for key, gradient in pairs:
            inner = f"{path}.{key}" if path else str(key)
            pair = _child(parameters, key), _child(state, key)
            self._collect(gradient, *pair, what, inner)

    def __len__(self) -> int:
        return len(self._gradients)

    @property
    def gradients(self) -> list[Any]:
        return [*self._gradients]

    @property
    def parameters(self) -> list[Any]:
        return [*self._parameters]

    @property
    def states(self) -> list[Any]:
        return [*self._states]

    def dtypes(self) -> list[mx.Dtype] | None:
        """The distinct dtypes of the gradients; None if something is no array."""
        if not all(isinstance(gradient, mx.array) for gradient in self._gradients):
            return None
        return [*dict.fromkeys(gradient.dtype for gradient in self._gradients)]

    def update(
        self,
        rule: str,
        hyperparameters: Sequence[dict[str, float | mx.array]],
        *,
        sets: Sequence[int] | None = None,
        learning_rate: mx.array | None = None,
        step: mx.array | None = None,
        gradient_scale: mx.array | None = None,
        skip: mx.array | None = None,
        coefficient: mx.array | None = None,
        seed: mx.array | None = None,
        per_tensor: bool = False,
        state_dtype: mx.Dtype | None = None,
        indices: Sequence[int] | None = None,
        after: Sequence[mx.array] = (),
        numbers: Sequence[tuple[int, int]] = (),
    ) -> bool:
        """Updates leaves by a rule; False if something is no array."""
        if self.ema is not None and f"{rule}Averaged" in _averaged_rules():
            rule = f"{rule}Averaged"
            hyperparameters = [{"ema": self.ema, **x} for x in hyperparameters]
        kind = _rule_named(rule)
        prepared = [_with_numbers(kind, values) for values in hyperparameters]
        chosen = [*range(len(self))] if indices is None else [*indices]
        held = [self._held(rule, kind, i) for i in chosen]
        slots = [
            self._slots(kind, i, state_dtype, entry)
            for i, entry in zip(chosen, held, strict=True)
        ]
        if any(not isinstance(x, mx.array) for tensor in slots for x in tensor):
            return False
        set_of = [0] * len(chosen) if sets is None else sets
        _check_sets(set_of, len(chosen), len(prepared))
        count = len(chosen) if per_tensor else 1
        scalars: dict[str, mx.array] = {}
        if kind.reads_learning_rate:
            if learning_rate is not None and learning_rate.ndim > 0 and not per_tensor:
                scalars["rate"] = learning_rate  # broadcasts
            else:
                scalars["rate"] = _scalar("learning_rate", learning_rate, count)
        if kind.reads_step:
            scalars["step"] = _scalar("step", step, count, mx.uint64)
        if gradient_scale is not None:
            scalars["gradient_scale"] = _scalar(
                "gradient_scale", gradient_scale, count, mx.float32
            )
        if skip is not None:
            scalars["skip"] = _scalar("skip", skip, count, mx.bool_)
        if kind.reads_coefficient:
            scalars["coefficient"] = _scalar(
                "coefficient", coefficient, count, mx.float32
            )

        changed = []
        for entry, given in enumerate(slots):
            own = {
                name: x[entry] if per_tensor and x.size > 1 else x
                for name, x in scalars.items()
            }
            new = _updated(prepared[set_of[entry]], given, **own)
            is_random = seed is not None and kind.writes_parameter
            i = chosen[entry]
            place = numbers[i] if numbers else (i, 0)
            changed.append(
                self._stored(
                    rule,
                    kind,
                    i,
                    given,
                    new,
                    held[entry],
                    self.keep_dtypes or state_dtype is not None,
                    (seed, step, *place) if is_random else None,
                )
            )
        for i, (new, entries) in zip(chosen, changed, strict=True):
            if kind.reads_parameter and kind.writes_parameter:
                self._parameters[i] = new[0]
            if kind.writes_gradient:
                self._gradients[i] = new[-1]
            for key, value in entries.items():
                self._changes.append((i, key, value))
        return True

    def _held(self, rule: str, kind: Any, i: int) -> dict[str, Any]:
        """The states in codes, and a weight's error, as ``_ext`` finds them."""
        state = self._states[i]
        if not isinstance(state, dict) or not kind.reads_parameter:
            return {}
        held = {
            key: codes
            for key in kind.state_names
            if key not in state and (codes := kind_of(state, key))
        }
        parameter = self._parameters[i]
        if is_half(parameter) and is_error(state.get("error")):
            _check_shape("error", state["error"], parameter)
            held["error"] = "24bit" if state["error"].dtype == mx.int8 else "32bit"
        for key in held.keys() - {"error"}:
            if not has_shape(state, key, parameter.shape):
                codes = state[f"{key}_{held[key]}"]
                raise ValueError(
                    f"the state {key}_{held[key]} has shape {_shape(codes.shape)}; "
                    f"expected that of a parameter of shape {_shape(parameter.shape)}"
                )
        return held

    def _stored(
        self,
        rule: str,
        kind: Any,
        i: int,
        given: list[mx.array],
        new: list[mx.array],
        held: dict[str, Any],
        keep_dtypes: bool,
        random: tuple[Any, Any, int, int] | None,
    ) -> tuple[list[mx.array], dict[str, mx.array]]:
        """The new slots, and the entries of the state."""
        parameter = self._parameters[i]
        is_random = random is not None and is_half(parameter) and "error" not in held
        plain = _stored(kind, given, new, keep_dtypes or bool(held) or is_random)
        first = int(kind.reads_parameter)
        entries = dict(zip(kind.state_names, plain[first:], strict=False))
        for key in entries.keys() & held.keys():
            value = new[first + kind.state_names.index(key)]
            codes, scales = encode(value, held[key], key in kind.non_negative_names)
            del entries[key]
            entries |= {f"{key}_{held[key]}": codes, f"{key}_scales": scales}
        if "error" in held and kind.writes_parameter:
            plain[0], entries["error"] = split(new[0], held["error"], parameter.dtype)
        elif is_random and random is not None:
            plain[0] = round_stochastically(
                new[0].astype(mx.float32), parameter.dtype, *random
            )
        return plain, entries

    def _slots(
        self, rule: Any, i: int, state_dtype: mx.Dtype | None, held: dict[str, Any]
    ) -> list[Any]:
        """Parameter, states and gradient, as far as the rule has them."""
        slots = [self._parameters[i]] if rule.reads_parameter else []
        if "error" in held:
            slots = [join(slots[0], self._states[i]["error"])]
        for key in rule.state_names:
            state = self._states[i]
            if key in held:
                codes, scales = state[f"{key}_{held[key]}"], state[f"{key}_scales"]
                is_positive = key in rule.non_negative_names
                shape = self._parameters[i].shape
                slots.append(decode(codes, scales, shape, held[key], is_positive))
                continue
            value = state.get(key) if isinstance(state, dict) else None
            if isinstance(value, mx.array):
                _check_state(rule, key, value, self._parameters[i], self._gradients[i])
                # There is no half a complex number.
                is_average = key == AVERAGE and rule.reads_parameter
                keeps = value.dtype == mx.complex64 or is_average
                if state_dtype is not None and not keeps:
                    value = value.astype(state_dtype)
            slots.append(value)
        return [*slots, self._gradients[i]]

    def set_gradient(self, index: int, value: Any) -> None:
        self._gradients[index] = value

    def set_parameter(self, index: int, value: Any) -> None:
        self._parameters[index] = value

    def set_state(self, index: int, key: str, value: Any) -> None:
        self._changes.append((index, key, value))

    def commit(self) -> Any:
        """Writes the changes of the states; returns the updated parameters."""
        result = _with_leaves(self.tree, iter(self._parameters))
        for index, key, value in self._changes:
            self._states[index][key] = value
        return result

    def replace(self, leaves: list[Any]) -> Any:
        """The gradients' tree with other leaves."""
        if len(leaves) != len(self):
            raise ValueError("leaves: expected as many as the tree has")
        return _with_leaves(self.tree, iter(leaves))


class Snapshot:
    """What a tree's dicts and lists hold now: the arrays' values, not the objects.

    With ``like``, those of the leaves alone that ``like`` has.
    """

    def __init__(self, tree: Any, like: Any = None) -> None:
        self._contents: list[tuple[Any, Any]] = []
        self._leaves: list[tuple[Any, Any, Any]] = []  # node, key and value
        if like is None:
            self._record(tree)
        else:
            self._record_like(tree, like)

    def _record(self, tree: Any) -> None:
        if isinstance(tree, dict):
            values = [*tree.values()]
            self._contents.append((tree, {k: _value(v) for k, v in tree.items()}))
        elif isinstance(tree, (list, tuple)):
            values = [*tree]
            if isinstance(tree, list):
                self._contents.append((tree, [_value(x) for x in tree]))
        else:
            return
        for value in values:
            self._record(value)

    def _record_like(self, tree: Any, like: Any) -> None:
        pairs = like.items() if isinstance(like, dict) else enumerate(like)
        for key, like_child in pairs:
            value = _child(tree, key)
            if value is _NOTHING:
                continue
            if isinstance(like_child, (dict, list, tuple)):
                self._record_like(value, like_child)
            elif isinstance(tree, (dict, list)):
                self._leaves.append((tree, key, _value(value)))

    def restore(self) -> None:
        """Undoes every change since."""
        for node, key, value in self._leaves:
            type_ = dict if isinstance(node, dict) else list
            type_.__setitem__(node, key, _restored(value, _child(node, key)))
        for node, content in self._contents:
            if isinstance(node, list):
                now = [*node, *[None] * len(content)]
                before = [_restored(*pair) for pair in zip(content, now, strict=False)]
                list.__setitem__(node, slice(None), before)
            else:
                values = {k: _restored(v, node.get(k)) for k, v in content.items()}
                dict.clear(node)
                dict.update(node, values)


def num_threads() -> int:
    return 1


def set_num_threads(count: int) -> None:
    if count < 1:
        raise ValueError(f"[set_num_threads] count is {count}; expected at least 1.")


def check_update(
    rule: str,
    parameter: mx.array,
    gradient: mx.array,
    state: mx.array,
    parameter_storage: str = "plain",
    state_storage: str = "plain",
    must_be_in_place: bool = True,
) -> str | None:
    return NO_KERNELS


def check_sums(array: mx.array, counts: bool = False) -> str | None:
    return NO_KERNELS


def reset_trust() -> None:
    pass


def instruction_set() -> str:
    return "plain MLX operations"


def bytes_copied() -> int:
    return 0


def known(count: mx.array) -> int | None:
    return None  # MLX does not tell without waiting


def _sum(x: mx.array) -> mx.array:
    # MLX may not return from the sum of an array without elements.
    if x.size == 0:
        return mx.array(0.0)
    # On the CPU mx.sum adds one after the other, and loses digits of long arrays: so
    # sums of rows, and of these sums.
    row, flat = 64, x.reshape(-1)
    while flat.size > row:
        end = flat.size // row * row
        sums = mx.sum(flat[:end].reshape(-1, row), axis=1)
        flat = mx.concatenate([sums, flat[end:]]) if end < flat.size else sums
    return mx.sum(flat)


# Trees


_NOTHING: Any = object()


def _child(node: Any, key: Any) -> Any:
    """What a node has at a key; None for a tree that is not given."""
    if node is None or node is _NOTHING:
        return node
    try:
        return node[key]
    except (LookupError, TypeError, ValueError):  # arrays and lists have other keys
        return _NOTHING


def _value(x: Any) -> tuple[Any, Any]:
    """An object, and of an array what it is now: it may change."""
    return x, copy.copy(x) if isinstance(x, mx.array) else x


def _restored(value: tuple[Any, Any], now: Any) -> Any:
    """What was there, in its own object if that still is."""
    x, before = value
    if (
        x is before
        or x is not now
        or (x.dtype, x.shape) != (before.dtype, before.shape)
    ):
        return before
    x[()] = before  # x[...] fails before MLX 0.32
    return x


def _with_leaves(tree: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _with_leaves(value, leaves) for key, value in tree.items()}
    if not isinstance(tree, (list, tuple)):
        return next(leaves)
    children = [_with_leaves(value, leaves) for value in tree]
    if type(tree) is list:
        return children
    # A named tuple takes its fields one by one.
    kind: Any = type(tree)
    return kind(*children) if hasattr(tree, "_fields") else kind(children)


# An update


def _rule_named(name: str) -> Any:
    known = _all_rules()
    if name in _averaged_rules():
        return _averaged_rules()[name]
    if name not in known:
        raise ValueError(
            f'[fused_update] rule is "{name}"; expected one of {", ".join(known)}.'
        )
    return known[name]


@cache
def _all_rules() -> dict[str, Any]:
    """The header's rules of one element, and Adafactor's."""
    factored = [_adafactor(m, w) for m in (True, False) for w in (False, True)]
    return rules() | {rule.__name__: rule for rule in factored}


@cache
def _averaged_rules() -> dict[str, Any]:
    """The rules that write the parameter, with an average of it behind their states."""
    averaged = {}
    for rule in rules().values():
        if rule.reads_parameter and rule.writes_parameter:
            averaged[f"{rule.__name__}Averaged"] = _averaged(rule)
    return averaged


def _averaged(rule: Any) -> Any:
    class Averaged(rule):  # type: ignore[misc]
        number_names = ("ema", *rule.number_names)
        state_names = (*rule.state_names, AVERAGE)

        def update(self, g: Any, p: Any, s: list[Any]) -> tuple[Any, Any, list[Any]]:
            g, p, states = rule.update(self, g, p, s[:-1])
            average = header()["moving_average"](self.ema, s[-1], p)
            return g, p, [*states, average]

    Averaged.__name__ = f"{rule.__name__}Averaged"
    return Averaged


def _adafactor(is_matrix: bool, has_moment: bool) -> Any:
    """The parts of Adafactor put together, as in csrc/graph/factored.cpp."""
    parts = header()["Adafactor"]
    mean_names = ("exp_avg_sq_row", "exp_avg_sq_col") if is_matrix else ("exp_avg_sq",)

    class Adafactor(parts, header()["RuleDefaults"]):  # type: ignore[valid-type, misc]
        number_names = parts.number_names
        state_names = (*mean_names, *(("exp_avg",) if has_moment else ()))
        means = len(mean_names)
        reads_step = True

        def update(self, g: Any, p: Any, s: list[Any]) -> tuple[Any, Any, list[Any]]:
            squares = mx.square(g)
            row: Any = 1.0
            if is_matrix:
                s[0] = self.running_mean(s[0], mx.mean(squares, axis=-1))
                s[1] = self.running_mean(s[1], mx.mean(squares, axis=-2))
                mean = mx.mean(s[0], axis=-1, keepdims=True)
                row = (self.factor(s[0]) * mx.sqrt(mean))[..., None]
                column = self.factor(s[1])[..., None, :]
            else:
                s[0] = self.running_mean(s[0], squares)
                column = self.factor(s[0])
            u = header()["direction"](row, column, g)
            scaled_rate = self.scaled_rate(mx.mean(mx.square(p)))
            u = u * self.clipped(scaled_rate, mx.mean(mx.square(u)))
            if has_moment:
                u, s[-1] = self.average(u, s[-1])
            return g, *self.write(u, scaled_rate, p), s

    kind = "Matrix" if is_matrix else "Vector"
    Adafactor.__name__ = f"Adafactor{kind}{'WithMoment' if has_moment else ''}"
    return Adafactor


def _is_written(rule: Any) -> list[bool]:
    """Of each slot, whether the rule writes it."""
    parameter = [rule.writes_parameter] if rule.reads_parameter else []
    return [*parameter, *[True for _ in rule.state_names], rule.writes_gradient]


def _with_numbers(rule: Any, values: dict[str, Any]) -> Any:
    """The rule with its hyper-parameters."""
    if values.keys() != {*rule.number_names}:
        raise ValueError(
            f"[fused_update] hyperparameters of {rule.__name__} are "
            f"{{{', '.join(values)}}}; expected {{{', '.join(rule.number_names)}}}."
        )
    prepared = rule()
    for name, value in values.items():
        setattr(prepared, name, number_of(value))
    return prepared


def _check_state(
    rule: Any, key: str, value: mx.array, parameter: Any, gradient: mx.array
) -> None:
    """It would widen the parameter, or be widened.

    Gradients that broadcast make such a state when they are the first step's.
    """
    if not rule.reads_parameter or not isinstance(parameter, mx.array):
        return
    axis = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}.get(key)  # the one averaged
    shapes = [[*x.shape] for x in (parameter, gradient)]
    if axis is not None and _means(rule) == 2:
        for shape in shapes:
            del shape[axis]
    if [*value.shape] not in shapes:
        raise ValueError(
            f"the state {key} has shape {_shape(value.shape)}; expected "
            f"{_shape(shapes[0])}"
        )


def _check_shape(key: str, value: mx.array, parameter: mx.array) -> None:
    if value.shape != parameter.shape:
        raise ValueError(
            f"the state {key} has shape {_shape(value.shape)}; expected "
            f"{_shape(parameter.shape)}"
        )


def _in_blocks(a: mx.array, block: int) -> mx.array:
    """As rows of blocks, filled up with zeros."""
    flat = a.reshape(-1)
    rest = -flat.size % block
    return (mx.pad(flat, (0, rest)) if rest else flat).reshape(-1, block)


def _most(storage: str, is_never_negative: bool) -> float:
    bits = 8 if storage == "int8" else 4
    return float((1 << (bits if is_never_negative else bits - 1)) - 1)


def _exponents(error: mx.Dtype) -> int:
    return 18 if error == mx.int8 else 26


def _shape(shape: Sequence[int]) -> str:
    return f"({','.join(map(str, shape))})"


def _check_sets(set_of: Sequence[int], tensors: int, sets: int) -> None:
    if len(set_of) != tensors:
        raise ValueError(
            "[fused_update] the list of hyper-parameter sets has "
            f"{len(set_of)} entries; expected {tensors}."
        )
    for number in set_of:
        if not 0 <= number < sets:
            raise ValueError(
                f"[fused_update] a tensor has hyper-parameter set {number}; there are "
                f"{sets}."
            )


def _scalar(
    name: str, value: mx.array | None, entries: int, dtype: mx.Dtype | None = None
) -> mx.array:
    """A scalar, or one entry per tensor, of the dtype that kernels read."""
    if value is None:
        raise ValueError(f"[fused_update] {name} is missing; the rule reads it.")
    if value.size != 1 and value.shape != (entries,):
        more = f" or ({entries})" if entries != 1 else ""
        raise ValueError(
            f"[fused_update] {name} has shape {_shape(value.shape)}; expected a "
            f"scalar{more}."
        )
    if value.size == 1:
        value = value.reshape(())
    return value if dtype is None else value.astype(dtype)


def _updated(
    rule: Any,
    given: list[mx.array],
    rate: mx.array | None = None,
    step: mx.array | None = None,
    gradient_scale: mx.array | None = None,
    skip: mx.array | None = None,
    coefficient: mx.array | None = None,
) -> list[mx.array]:
    """What the slots of one tensor become; half precision is computed in float32."""
    has_pairs = _takes_pairs(type(rule), given)
    is_usual = has_pairs or all(x.dtype in FUSED_DTYPES for x in given)
    slots = [x.astype(mx.float32) if is_usual else x for x in given]
    if has_pairs:
        slots = [_to_pairs(x) for x in given]
        rate = rate[..., None] if rate is not None and rate.ndim > 0 else rate
    dtype = slots[-1].dtype
    if gradient_scale is not None:
        slots[-1] = (slots[-1] * gradient_scale).astype(dtype)
    if _means(rule):  # it multiplies them with the parameter's root mean square
        is_inexact = mx.issubdtype(slots[0].dtype, mx.inexact)
        dtype = slots[0].dtype if is_inexact else mx.float32
    if step is not None and not is_usual and mx.issubdtype(dtype, mx.floating):
        step = step.astype(dtype)
    rule.prepare(
        0.0 if rate is None else rate.astype(dtype),
        0.0 if step is None else step,
        *([] if coefficient is None else [coefficient.astype(dtype)]),
    )
    first = int(rule.reads_parameter)
    parameter = slots[0] if first else None
    wide = [*slots]
    gradient, parameter, states = rule.update(slots[-1], parameter, slots[first:-1])
    slots = [*([parameter] if first else []), *states, gradient]
    # A state that is set to a gradient that broadcasts keeps its shape.
    slots = [
        mx.broadcast_to(x, mx.broadcast_shapes(x.shape, old.shape))
        for x, old in zip(slots, wide, strict=True)
    ]
    if has_pairs:
        slots = [x.view(mx.complex64).squeeze(-1) for x in slots]
    if skip is not None:
        slots = [mx.where(skip, *pair) for pair in zip(given, slots, strict=True)]
    return slots


def _takes_pairs(rule: Any, given: list[mx.array]) -> bool:
    """Whether a complex number is two real ones, as in csrc/graph/composed.cpp."""
    is_complex = any(x.dtype == mx.complex64 for x in given)
    name = rule.__name__.removesuffix("Averaged")
    return is_complex and name not in ("Lion", "Adamax")


def _to_pairs(x: mx.array) -> mx.array:
    """With a last axis of 2, real and imaginary."""
    numbers = x.astype(mx.complex64)
    return mx.stack([mx.real(numbers), mx.imag(numbers)], axis=-1)


def _stored(
    rule: Any, given: list[mx.array], new: list[mx.array], keep_dtypes: bool
) -> list[mx.array]:
    """The new slots in the dtypes that they take."""
    dtypes = [x.dtype for x in given]
    if _takes_pairs(rule, given):
        return new
    if not keep_dtypes and not FUSED_DTYPES.issuperset(dtypes):
        dtypes = [x.dtype for x in new]
    elif not keep_dtypes:
        dtypes = [
            _promoted(rule, dtypes, slot) if is_written else dtypes[slot]
            for slot, is_written in enumerate(_is_written(rule))
        ]
    # No step is to meet an infinite mean of squares.
    for slot in range(1, _means(rule) + 1):
        if dtypes[slot] == mx.float16:
            new[slot] = mx.minimum(new[slot], 65504.0)
    return [x.astype(dtype) for x, dtype in zip(new, dtypes, strict=True)]


def _means(rule: Any) -> int:
    """How many of a rule's states, the first, are Adafactor's means of squares."""
    return getattr(rule, "means", 0)


def _promoted(rule: Any, dtypes: list[mx.Dtype], slot: int) -> mx.Dtype:
    """The dtype of a slot after an update, as in csrc/graph/layout.cpp."""
    is_state = int(rule.reads_parameter) <= slot < len(dtypes) - 1
    # A state takes in the gradient; everything else, the states too. An average of
    # the weights has a dtype of its own.
    met = dtypes
    if rule.reads_parameter and AVERAGE in rule.state_names:
        place = 1 + rule.state_names.index(AVERAGE)
        if slot == place:
            return dtypes[slot]
        met = [*dtypes[:place], *dtypes[place + 1 :]]
    if is_state and not rule.writes_gradient and not _means(rule):
        met = [dtypes[slot], dtypes[-1]]
    return met[0] if len({*met}) == 1 else mx.float32


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
