"""Checkpoints: a model's parameters and an optimizer's state in one file.

The file is a safetensors file with two SHA-256 digests in its metadata, so that a
damaged one is refused, and with the configuration that the state does not hold.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from hashlib import sha256
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ._formats import AVERAGE, HALF_DTYPES, HELD, has_shape, plain_name
from ._kernels import kernels
from .optimizers.base import INIT, OPTION_ENTRIES, Optimizer, parts_of, rebuilt
from .optimizers.multi import SUMS
from .optimizers.options import OPTIONS, VARIANTS, warn_caller

__all__ = ["load", "save"]

Arrays = dict[str, mx.array]

FORMAT = "mlx_fused_optimizers/checkpoint"
VERSION = 1
UNKNOWN = "0" * 64  # in place of a digest, while it is computed
# The metadata comes first, so that the header's digest, which covers the rest of the
# header and its length, has a place that does not depend on anything else.
HEADER_START = re.compile(
    rf'\{{"__metadata__":\{{"format":"{FORMAT}/(\d+)","header_sha256":"'.encode()
    + rb'([0-9a-f]{64})"'
)
DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "U16": mx.uint16,
    "U32": mx.uint32,
    "U64": mx.uint64,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "F64": mx.float64,
    "C64": mx.complex64,
}
# Integers of each size, as MLX and memoryview call them: memoryview has no bfloat16,
# and one dimension of bytes would be too long for MLX from 2 GiB on.
BITS: dict[int, tuple[mx.Dtype, Literal["B", "H", "I", "Q"]]] = {
    1: (mx.uint8, "B"),
    2: (mx.uint16, "H"),
    4: (mx.uint32, "I"),
    8: (mx.uint64, "Q"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MALFORMED = (AttributeError, KeyError, RecursionError, TypeError, ValueError)


def save(
    path: str | os.PathLike[str],
    model: nn.Module | dict[str, Any],
    optimizer: stock.Optimizer,
    trainable: bool = False,
) -> None:
    """Save a model's parameters and an optimizer's state and configuration.

    The file is written beside ``path`` and renamed when it is complete and on disk:
    whatever interrupts that, the file that was there before stays whole. It is a
    safetensors file that ``mlx.core.load`` reads too (but for float64, which that
    does not know). Its arrays are named ``model.<path>`` and ``optimizer.<path>``.

    The configuration is the optimizer's class name and public attributes: betas, eps,
    weight decay, options and so on, for a :class:`MultiOptimizer` those of its parts.
    Of schedules and filters it holds that there is one, as they are code.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = optim.AdamW(learning_rate=1e-3)
        >>> optimizer.init(model.trainable_parameters())
        >>> optim.save("digits.safetensors", model, optimizer)
        >>> sorted(mx.load("digits.safetensors"))[:3]
        ['model.bias', 'model.weight', 'optimizer.bias.m']

    Args:
        path (str or PathLike): The file, written at exactly this path; no suffix is
            added. A symbolic link's target is replaced, not the link.
        model (mlx.nn.Module or dict): The model, of which all parameters are saved,
            frozen ones too; or a tree of parameters: a dict with dicts, lists, tuples
            and arrays of any shapes and dtypes.
        optimizer (mlx.optimizers.Optimizer): An optimizer of this package, of
            ``mlx.optimizers`` or of your own.
        trainable (bool, optional): Save the model's trainable parameters and their
            state alone, such as adapters without the model below. Default: ``False``

    Raises:
        OSError: If the file cannot be written.
        RuntimeError: If arrays are placeholders of ``mx.compile``.
        TypeError: If an argument or a leaf of a tree is of the wrong type.
        ValueError: If the state is not that of the model's parameters, or two arrays
            have the same path.
    """
    if hasattr(optimizer, "_save"):  # of all ranks
        optimizer._save(path, model, trainable)
        return
    parameters = _parameters(model)
    state = _state_arrays(optimizer)
    match = _Match()
    match.state(optimizer, parameters, state)
    _refuse(
        "the optimizer's state does not fit the model; if that has changed, call "
        f"{INIT} before",
        match.problems,
    )
    if trainable:
        parameters = _parameters(model, trainable)
        state = _arrays(_Match().state(optimizer, parameters, state))
    named = _arrays(parameters)
    arrays = {
        **{f"model.{name}": array for name, array in named.items()},
        **{f"optimizer.{name}": array for name, array in state.items()},
    }
    try:
        mx.eval(arrays)
    except RuntimeError as error:
        if "without a primitive" not in str(error):
            raise
        raise RuntimeError(
            "parameters or optimizer state are placeholders of mx.compile, which a "
            "function that raised while it was traced has left; restore them before"
        ) from error
    _write(Path(path), arrays, _configuration(optimizer))


def load(
    path: str | os.PathLike[str],
    model: nn.Module | dict[str, Any],
    optimizer: stock.Optimizer,
    strict: bool = True,
    trainable: bool = False,
) -> None:
    """Load what :func:`save` saved into a model and an optimizer of the same kind.

    Everything is checked before anything is changed: the whole file against its
    digests, then names, shapes and dtypes against the model and the optimizer, and the
    configuration. One error names all that does not fit, and leaves parameters, state
    and step count as they were. The learning rate is part of the state.

    The state is restored into the dicts that the optimizer has, so that functions
    compiled with ``mx.compile`` go on working. A parameter without state in the file
    gets a new one at the next step.

    A file without the options that the optimizer has loads too. The state is converted
    to ``state_dtype`` if that is set, or with ``strict=False`` to what the optimizer
    would make, and one warning says from what to what. So is a float32 parameter that
    the model has in half precision and the optimizer with a master.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = optim.AdamW(learning_rate=1e-3)
        >>> optim.save("digits.safetensors", model, optimizer)
        >>> resumed = nn.Linear(3, 2)
        >>> optim.load("digits.safetensors", resumed, optim.AdamW(1e-3))
        >>> mx.array_equal(resumed.weight, model.weight).item()
        True
        >>> other = nn.Linear(3, 2, bias=False)
        >>> optim.load("digits.safetensors", other, optim.AdamW(1e-3, eps=1e-6))
        Traceback (most recent call last):
            ...
        ValueError: digits.safetensors does not fit:
          parameter 'bias': found float32 (2,), expected nothing
          configuration 'eps': found 1e-08, expected 1e-06

    Args:
        path (str or PathLike): The file.
        model (mlx.nn.Module or dict): The model, or the tree of parameters, as in
            :func:`save`; its arrays are replaced in its own dicts and lists.
        optimizer (mlx.optimizers.Optimizer): The optimizer; initialized or not. Those
            of this package and of ``mlx.optimizers`` load each other's files.
        strict (bool, optional): Refuse a file whose configuration is not the
            optimizer's. Otherwise the optimizer keeps its own. Default: ``True``
        trainable (bool, optional): Load a file that was saved with the same argument:
            the frozen parameters stay. Default: ``False``

    Raises:
        OSError: If the file cannot be read.
        TypeError: If an argument or a leaf of a tree is of the wrong type.
        ValueError: If the file is no checkpoint, is damaged, or does not fit.
    """
    if hasattr(optimizer, "_load"):  # of all ranks
        optimizer._load(path, model, strict, trainable)
        return
    found = fitting(path, model, optimizer, strict, trainable)
    commit(model, found.parameters, optimizer, found.state)
    found.warn()


class Fitting(NamedTuple):
    """What a file has for a model and an optimizer, in trees like theirs."""

    parameters: Any
    state: dict[str, Any]
    digest: str  # of the file's data
    converted: str

    def warn(self) -> None:
        if self.converted:
            warn_caller(self.converted)


def fitting(
    path: str | os.PathLike[str],
    model: nn.Module | dict[str, Any],
    optimizer: stock.Optimizer,
    strict: bool,
    trainable: bool,
) -> Fitting:
    """A file after all checks; nothing is changed."""
    parameters = _parameters(model, trainable)
    here = _arrays(parameters)
    _state_arrays(optimizer)  # checks its type
    configuration, arrays, digest = _read(path)
    found: dict[str, Arrays] = {"model": {}, "optimizer": {}}
    for name, array in arrays.items():
        root, _, rest = name.partition(".")
        found[root][rest] = array

    saved = found["model"]
    match = _Match(converts=not strict)
    match.split_weights(optimizer, here, saved)
    match.problems += _differences("parameter", _kinds(saved), _kinds(here))
    state = match.state(optimizer, parameters, found["optimizer"])
    if strict:
        has, wants = _settings(configuration), _settings(_configuration(optimizer))
        # Options may be added in mid-run.
        new = wants.keys() - has
        added = {n for n in new if n.rpartition(".")[2] in (*OPTIONS, *VARIANTS)}
        wants = {name: want for name, want in wants.items() if name not in added}
        match.problems += _differences("configuration", has, wants)
    title = f"{os.fspath(path)} does not fit"
    if saved.keys() < here.keys() and isinstance(model, nn.Module):
        title += "; a file saved with trainable=True is loaded with the same"
    _refuse(title, match.problems)
    converted = ", ".join(f"{n} arrays from {k}" for k, n in match.converted.items())
    return Fitting(
        tree_map_with_path(lambda p, _: saved[p], parameters),
        state,
        digest,
        converted and f"{os.fspath(path)}: the state was converted: {converted}",
    )


def _parameters(model: Any, trainable: bool = False) -> Any:
    """The tree of parameters, in containers of its own."""
    if isinstance(model, nn.Module):
        return model.trainable_parameters() if trainable else model.parameters()
    if trainable:
        raise TypeError(
            f"model is of type {type(model).__name__}; with trainable=True expected an "
            "mlx.nn.Module"
        )
    if isinstance(model, dict):
        return tree_map(lambda leaf: leaf, model)
    raise TypeError(
        f"model is of type {type(model).__name__}; expected an mlx.nn.Module or a dict"
    )


def _state_arrays(optimizer: Any) -> Arrays:
    if not isinstance(optimizer, stock.Optimizer):
        raise TypeError(
            f"optimizer is of type {type(optimizer).__name__}; expected an "
            "mlx.optimizers.Optimizer"
        )
    if isinstance(optimizer, Optimizer):
        optimizer._refuse_averaged("a checkpoint")
    return _arrays(optimizer.state, mx.array)


def _arrays(tree: Any, convert: Callable[[Any], mx.array] | None = None) -> Arrays:
    """The leaves by their paths; those that are no arrays are converted or refused."""
    arrays: Arrays = {}
    flat: Any = tree_flatten(tree)
    for path, leaf in flat:
        if path in arrays:
            raise ValueError(f"two arrays have the path '{path}'")
        if isinstance(leaf, mx.array):
            arrays[path] = leaf
        elif convert is not None and hasattr(leaf, "__float__"):
            # A schedule's number or NumPy's array, as a step would take it.
            arrays[path] = convert(leaf)
        else:
            raise TypeError(
                f"'{path}' is of type {type(leaf).__name__}; expected an mx.array"
            )
    return arrays


# What does not fit


def _refuse(title: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([f"{title}:", *problems]))


def _differences(
    what: str, found: dict[str, str], expected: dict[str, str]
) -> list[str]:
    names = [*expected, *(name for name in found if name not in expected)]
    pairs = {n: (found.get(n, "nothing"), expected.get(n, "nothing")) for n in names}
    return [
        f"{what} '{name}': found {have}, expected {want}"
        for name, (have, want) in pairs.items()
        if have != want
    ]


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _kind(array: mx.array) -> str:
    return f"{_dtype_name(array.dtype)} {array.shape}"


def _kinds(arrays: Arrays) -> dict[str, str]:
    return {name: _kind(array) for name, array in arrays.items()}


def _configuration(optimizer: stock.Optimizer) -> Any:
    """Class and public attributes, as they come back from JSON."""
    return json.loads(json.dumps(optimizer, default=_describe, skipkeys=True))


def _describe(value: Any) -> Any:
    """What stands for a value that JSON has no type for."""
    if isinstance(value, stock.Optimizer):
        public = {
            k: v
            for k, v in vars(value).items()
            if not k.startswith("_") and k != "groups"  # code
        }
        return {
            "class": type(value).__name__,
            **public,
            "schedulers": value._schedulers,
        }
    if isinstance(value, mx.Dtype):
        return str(value)
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        return value.item()
    return "a function" if callable(value) else f"of type {type(value).__name__}"


def settings_of(optimizer: stock.Optimizer) -> dict[str, str]:
    """An optimizer's settings by name, as files are compared by."""
    return _settings(_configuration(optimizer))


def _settings(configuration: Any) -> dict[str, str]:
    """By name. What is off is left out, so that an option need not be known."""
    flat: Any = tree_flatten(configuration)
    return {
        # 1 and 1.0 are the same setting.
        name: repr(int(v) if isinstance(v, float) and v.is_integer() else v)
        for name, v in flat
        if v is not None and v is not False
    }


class _Match:
    """A state tree made of saved arrays.

    What does not fit goes to ``problems``, and what was converted to ``converted``: how
    many arrays from one dtype to another.
    """

    def __init__(self, converts: bool = False) -> None:
        self.converts = converts
        self.problems: list[str] = []
        self.converted: Counter[str] = Counter()
        self.errors: Arrays = {}  # of float32 parameters that become weights

    def split_weights(
        self, optimizer: stock.Optimizer, here: Arrays, saved: Arrays
    ) -> None:
        """Make weights of saved float32 parameters, where a part has masters."""
        masters = {
            getattr(part, "master_weights", None) for part in parts_of(optimizer)
        }
        for master in filter(None, masters):
            for path, like in here.items():
                array = saved.get(path)
                if (
                    array is not None
                    and like.dtype in HALF_DTYPES
                    and array.dtype == mx.float32
                    and array.shape == like.shape
                ):
                    pair = kernels.split(array, master, like.dtype)
                    saved[path], self.errors[path] = pair
                    names = map(_dtype_name, (array.dtype, like.dtype))
                    self.converted[" to ".join(names)] += 1

    def state(
        self,
        optimizer: stock.Optimizer,
        parameters: Any,
        saved: Arrays,
        start: str = "",
    ) -> dict[str, Any]:
        """The state of an optimizer; ``start`` is where it lies in the outermost."""
        saved = dict(saved)
        state: dict[str, Any] = {}
        own = {k: v for k, v in optimizer.state.items() if not _is_node(v)}
        for name, value in _arrays(own, mx.array).items():
            if name not in saved and name in OPTION_ENTRIES:
                # The file is without the option, and without sums of gradients.
                state[name] = value * 0 if name == "micro_step" else value
                continue
            found = {name: saved.pop(name)} if name in saved else {}
            counts = mx.issubdtype(value.dtype, mx.integer) and name != "learning_rate"
            # The learning rate and other scheduled values may have any dtype.
            kinds = _kinds if counts else _shapes
            self.differ(start, kinds(found), kinds({name: value}))
            state |= found
        for name in OPTION_ENTRIES:
            saved.pop(name, None)

        if isinstance(optimizer, stock.MultiOptimizer):
            state["states"] = []
            for i, part in enumerate(optimizer.optimizers):
                inner = f"states.{i}."
                names = [name for name in saved if name.startswith(inner)]
                chosen = {name.removeprefix(inner): saved.pop(name) for name in names}
                state["states"].append(
                    self.state(part, parameters, chosen, start + inner)
                )
            inner = f"{SUMS}."
            names = [name for name in saved if name.startswith(inner)]
            chosen = {name.removeprefix(inner): saved.pop(name) for name in names}
            now = optimizer.state.get(SUMS)
            sums = self.parameters(optimizer, parameters, chosen, start + inner, now)
            self.differ(start + inner, _kinds(chosen), {})
            if now is not None and sums:
                state[SUMS] = sums
        else:
            state |= self.parameters(
                optimizer, parameters, saved, start, optimizer.state
            )
        self.differ(start, _kinds(saved), {})
        return state

    def differ(
        self, start: str, found: dict[str, str], expected: dict[str, str]
    ) -> None:
        pair = ({start + k: kind for k, kind in x.items()} for x in (found, expected))
        self.problems += _differences("state", *pair)

    def parameters(
        self,
        optimizer: stock.Optimizer,
        parameters: Any,
        saved: Arrays,
        root: str,
        current: Any,
    ) -> Any:
        """The parameters' states, in the form that ``init`` gives them.

        Takes out of ``saved`` what is a parameter's. ``current`` is what they are now.
        """
        below: dict[str, list[str]] = defaultdict(list)  # names by each start of theirs
        for name in saved:
            for dot in re.finditer(r"\.", name):
                below[name[: dot.start()]].append(name)

        options = ("state_dtype", "master_weights", "accumulate", "ema")
        converts = self.converts or any(getattr(optimizer, x, None) for x in options)

        def found_in(like: Any, found: Arrays) -> Any:
            return tree_map_with_path(lambda path, _: found[path], like)

        def states(node: Any, current: Any, path: str) -> Any:
            start = f"{path}." if path else ""
            if isinstance(node, dict):
                now: Any = current if isinstance(current, dict) else {}
                return {
                    key: states(child, now.get(key), f"{start}{key}")
                    for key, child in node.items()
                    if f"{start}{key}" in below
                }
            if isinstance(node, (list, tuple)):
                now = current if isinstance(current, (list, tuple)) else ()
                pairs = zip(node, chain(now, repeat(None)), strict=False)
                values = [states(*pair, f"{start}{i}") for i, pair in enumerate(pairs)]
                # Upstream's init wants no longer a list than that of the gradients,
                # which MultiOptimizer ends with the last of a part.
                while isinstance(node, list) and values and not values[-1]:
                    values.pop()
                return rebuilt(node, values)
            found = {n.removeprefix(start): saved.pop(n) for n in below.get(path, ())}
            return single(node, current, path, found) if found else {}

        def single(parameter: Any, current: Any, path: str, found: Arrays) -> Any:
            start = f"{path}." if path else ""
            expected: dict[str, Any] = {}
            optimizer.init_single(parameter, expected)
            if isinstance(optimizer, Optimizer):
                optimizer._hold(path, parameter, expected)
                there = {*map(plain_name, found)}
                added = {*optimizer._added_states()} - there
                found |= {k: x for k, x in expected.items() if plain_name(k) in added}
                if AVERAGE not in found:  # it starts at the file's weights
                    expected.pop(AVERAGE, None)
                if converts:
                    found = self.held_as(optimizer, path, parameter, expected, found)
            # Something else is right only if the optimizer has the same now, as when
            # its state was cast by hand.
            for like in (expected, current):
                if _is_node(like) and _kinds(_arrays(like, mx.array)) == _kinds(found):
                    return found_in(like, found)
            wanted = _arrays(expected)
            if converts and _shapes(found) == _shapes(wanted):
                for name, array in found.items():
                    if array.dtype != wanted[name].dtype:
                        pair = array.dtype, wanted[name].dtype
                        self.converted[" to ".join(map(_dtype_name, pair))] += 1
                        found[name] = array.astype(wanted[name].dtype)
                return found_in(expected, found)
            self.differ(root + start, _kinds(found), _kinds(wanted))
            return {}

        return states(parameters, current, "")

    def held_as(
        self,
        optimizer: Optimizer,
        path: str,
        parameter: mx.array,
        expected: dict[str, Any],
        found: Arrays,
    ) -> Arrays:
        """A parameter's saved state, held as the optimizer holds it."""
        if path in self.errors:
            found = {**found, "error": self.errors[path]}
        keys = {plain_name(entry) for entry in (*expected, *found)}
        keys -= {"error", *HELD}
        fits = all(has_shape(found, key, parameter.shape) for key in keys)
        if found.keys() == expected.keys() or not fits:
            return found
        held = dict(found)
        optimizer._hold(path, parameter, held)
        if AVERAGE not in found:
            held.pop(AVERAGE, None)
        if found.keys() - held or held.keys() - found - {*HELD}:
            self.converted[f"{', '.join(found)} to {', '.join(held)}"] += 1
        return held


def _shapes(arrays: Arrays) -> dict[str, str]:
    return {name: f"shape {array.shape}" for name, array in arrays.items()}


def _is_node(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple))


# Changing model and optimizer


def commit(
    model: Any, parameters: Any, optimizer: stock.Optimizer, state: dict[str, Any]
) -> None:
    """All or, if an interrupt comes, nothing."""
    parameters_before = _parameters(model)
    state_before = kernels.Snapshot(optimizer.state)
    flags_before = [(o, o._initialized) for o in parts_of(optimizer)]
    try:
        _assign(model, parameters)
        _merge(optimizer.state, state)
        for part, _ in flags_before:
            part._initialized = False  # as upstream's: init adds what is missing
    except BaseException:
        _assign(model, parameters_before)
        state_before.restore()
        for part, flag in flags_before:
            part._initialized = flag
        raise


def _assign(model: Any, parameters: Any) -> None:
    if isinstance(model, nn.Module):
        model.update(parameters)
    else:
        _merge(model, parameters)


def _merge(old: Any, new: Any) -> Any:
    """The new values in the old dicts and lists.

    ``mx.compile`` holds those, and tells their arrays apart by their order alone.
    """
    if isinstance(new, dict) and isinstance(old, dict):
        for key in [key for key in old if key not in new]:
            del old[key]
        for key, value in new.items():
            old[key] = _merge(old.get(key), value)
        return old
    if isinstance(new, (list, tuple)) and type(old) is type(new):
        pairs = zip(chain(old, repeat(None)), new, strict=False)
        values = [_merge(*pair) for pair in pairs]
        if isinstance(old, list):
            old[:] = values
            return old
        return rebuilt(new, values)
    return new


# The file


def _write(path: Path, arrays: Arrays, configuration: Any) -> None:
    path = Path(os.path.realpath(path))  # renaming would replace a symbolic link
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path} cannot be written: {path.parent} is not a directory"
        )
    temporary = path.with_name(f".checkpoint-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            _write_to(file, arrays, configuration)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_to(file: BinaryIO, arrays: Arrays, configuration: Any) -> None:
    metadata = {
        "format": f"{FORMAT}/{VERSION}",
        "header_sha256": UNKNOWN,
        "data_sha256": UNKNOWN,
        "configuration": json.dumps(configuration),
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": (begin, end),
        }
    file.seek(len(_header(entries)))
    digest = sha256()
    for array in arrays.values():
        if array.size == 0:  # memoryview casts none without elements
            continue
        bits: Any = mx.view(array, BITS[array.dtype.size][0], stream=mx.cpu)
        bits = mx.contiguous(bits, stream=mx.cpu)
        data = memoryview(bits).cast("B")
        digest.update(data)
        file.write(data)
    metadata["data_sha256"] = digest.hexdigest()
    metadata["header_sha256"] = sha256(_header(entries)).hexdigest()
    file.seek(0)
    file.write(_header(entries))


def _header(entries: dict[str, Any]) -> bytes:
    """Length and header; the digests' lengths are fixed, so that it is too."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as in the safetensors library
    return len(text).to_bytes(8, "little") + text


def _read(path: str | os.PathLike[str]) -> tuple[Any, Arrays, str]:
    """Configuration, arrays and digest of a file, after all of its checks."""
    name = os.fspath(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"{name} is cut short, damaged or no checkpoint")
        header = file.read(length)
        match = HEADER_START.match(header)
        if match is None:
            raise ValueError(f"{name} is no checkpoint of optim.save, or is damaged")
        blank = header[: match.start(2)] + UNKNOWN.encode() + header[match.end(2) :]
        if sha256(start + blank).hexdigest().encode() != match[2]:
            raise ValueError(f"the header of {name} is damaged")
        if int(match[1]) != VERSION:
            raise ValueError(
                f"{name} has version {int(match[1])} of the format; this version of "
                f"mlx_fused_optimizers reads {VERSION}"
            )
        try:
            metadata, entries = _parse(header)
        except MALFORMED as error:
            raise ValueError(f"the header of {name} is malformed: {error}") from error
        expected = sum(count for _, _, count in entries.values())
        if size - 8 - length != expected:
            raise ValueError(
                f"{name} is cut short or too long: {size - 8 - length} bytes of data, "
                f"expected {expected}"
            )
        digest = sha256()
        arrays: Arrays = {}
        for key, (dtype, shape, count) in entries.items():
            data = file.read(count)
            if len(data) != count:
                raise ValueError(f"{name} was cut short while it was read")
            digest.update(data)
            arrays[key] = _array(data, dtype, shape)
        if digest.hexdigest() != metadata["data_sha256"]:
            raise ValueError(f"the data of {name} is damaged")
    mx.eval(arrays)
    return json.loads(metadata["configuration"]), arrays, metadata["data_sha256"]


def _array(data: bytes, dtype: mx.Dtype, shape: list[int]) -> mx.array:
    if not data:
        return mx.zeros(shape, dtype, stream=mx.cpu)
    bits: Any = memoryview(data).cast(BITS[dtype.size][1], shape)
    return mx.view(mx.array(bits), dtype, stream=mx.cpu)


def _parse(
    header: bytes,
) -> tuple[dict[str, str], dict[str, tuple[mx.Dtype, list[int], int]]]:
    """Metadata, and each array's dtype, shape and bytes; the arrays lie in order."""
    entries = json.loads(header, object_pairs_hook=_unique)
    metadata = entries.pop("__metadata__")
    for key in ("data_sha256", "configuration"):
        if not isinstance(metadata[key], str):
            raise ValueError(f"{key} is no string")
    json.loads(metadata["configuration"])
    arrays = {}
    position = 0
    for name, entry in entries.items():
        if not name.startswith(("model.", "optimizer.")):
            raise ValueError(f"'{name}' is neither the model's nor the optimizer's")
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if not all(type(n) is int and 0 <= n < 2**31 for n in shape):
            raise ValueError(f"'{name}' has the shape {shape}")
        count = math.prod(shape) * dtype.size
        if entry["data_offsets"] != [position, position + count]:
            raise ValueError(f"'{name}' lies at {entry['data_offsets']}")
        position += count
        arrays[name] = (dtype, shape, count)
    return metadata, arrays


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result
