"""Collectives of a group of ranks: in one order, and none after a failure."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import zip_longest
from typing import Any

import mlx.core as mx

# Bytes of a collective in which states are gathered.
CHUNK = 64 << 20

# Bytes of a small message: a digest.
FRAME = 32

# The exit code of a rank that has waited longer than its timeout: EX_TEMPFAIL.
EXIT_CODE = 75

# By group. MLX waits for ever in a collective that follows one which has failed.
_broken: dict[Any, str] = {}
_scatters: dict[Any, bool] = {}


class Watchdog:
    """Ends the process when it has waited too long for others.

    Nothing else can: MLX waits for a collective outside of Python, where no signal
    arrives.
    """

    def __init__(self) -> None:
        self._deadline: float | None = None
        self._message = ""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, seconds: float | None, what: str) -> Iterator[None]:
        if seconds is None:
            yield
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        self._set(time.monotonic() + seconds, f"{what}; no answer in {seconds:g} s")
        try:
            yield
        finally:
            self._set(None, "")

    def _set(self, deadline: float | None, message: str) -> None:
        with self._changed:
            self._deadline, self._message = deadline, message
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while True:
                if self._deadline is None:
                    self._changed.wait()
                    continue
                left = self._deadline - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                # Not by a lock that the waiting thread may hold, as of sys.stderr.
                os.write(2, f"mlx_fused_optimizers: {self._message}\n".encode())
                os._exit(EXIT_CODE)


_watchdog = Watchdog()


class Ranks:
    """A group, and what its ranks do together.

    Outside of transformations each collective is evaluated by itself, so that the loss
    of a rank is an error here; inside, each depends on the one before: MLX orders them
    by their depth in the graph, which is not the same on each rank.
    """

    def __init__(self, group: mx.distributed.Group | None, timeout: float | None):
        world = mx.distributed.init()
        self.group = world if group is None else group
        self.timeout = timeout
        self.size: int = self.group.size()
        self.rank: int = self.group.rank()
        # Each call of init gives another object for the group of all ranks.
        self._key = "world" if self.size == world.size() else id(self.group)
        self._doing = "begin"
        self._is_lazy = False
        self._last: mx.array | None = None
        self._refused: Exception | None = None  # an error that all ranks know of

    def __deepcopy__(self, memo: Any) -> Ranks:
        return Ranks(self.group, self.timeout)  # MLX's groups cannot be copied

    def __reduce__(self) -> Any:
        if self._key != "world":
            raise TypeError("a group of some ranks cannot be pickled")
        return Ranks, (None, self.timeout)

    @contextmanager
    def doing(self, what: str, is_lazy: bool = False) -> Iterator[None]:
        """What errors name: a step, or what else ranks do together.

        An exception in between breaks the group: this rank leaves the others at some
        collective, and the next of its own would meet that.
        """
        self.check()
        self._doing, self._is_lazy, self._last = what, is_lazy, None
        try:
            yield
        except BaseException as error:
            is_joint = isinstance(error, RanksDifferError) or error is self._refused
            if not (is_joint or is_lazy or self.size == 1):
                _broken.setdefault(self._key, f"{what} failed: {error!r}")
            raise
        finally:
            self._last = self._refused = None

    @property
    def is_broken(self) -> bool:
        return self._key in _broken

    def check(self) -> None:
        """Raise RuntimeError if the group cannot be used any more."""
        if self.is_broken:
            raise RuntimeError(
                f"the group of {self.size} ranks is broken: {_broken[self._key]}. "
                "Start all ranks again, from the last checkpoint"
            )

    def is_scattering(self) -> bool:
        """Whether the group's backend has sum_scatter; ask once outside of graphs."""
        if self._key not in _scatters:
            try:
                mx.eval(
                    mx.distributed.sum_scatter(mx.zeros(self.size), group=self.group)
                )
                _scatters[self._key] = True
            except RuntimeError:
                _scatters[self._key] = False
        return _scatters[self._key]

    def _collect(self, function: Callable[..., mx.array], x: mx.array) -> mx.array:
        if self._is_lazy:
            if self._last is not None:
                (x,) = mx.depends([x], [self._last])
            self._last = function(x, group=self.group)
            return self._last
        mx.eval(x)  # errors of this rank alone, and its time, are no other's
        result = function(x, group=self.group)
        self.wait(result)
        return result

    def wait(self, *arrays: Any) -> None:
        """Evaluate arrays that need the other ranks."""
        self.check()
        what = f"rank {self.rank} of {self.size}, {self._doing}"
        try:
            with _watchdog.watching(self.timeout, what):
                mx.eval(*arrays)
        except RuntimeError as error:
            # A lazy step may have an error of its own, which leaves the others alone.
            loss = "failed or lost another" if self._is_lazy else "lost another"
            text = f"{self._doing}: rank {self.rank} of {self.size} {loss}: {error}"
            _broken[self._key] = text
            raise RuntimeError(text) from error

    def all_gather(self, x: mx.array) -> mx.array:
        """The rows of all ranks, one after the other."""
        return self._collect(mx.distributed.all_gather, x)

    def row_of_sum(self, row: Callable[[int], mx.array]) -> mx.array:
        """This rank's row of the sum over all ranks; ``row(r)`` is what it has of r's.

        Sent per rank: (N - 1) / N of all rows, and twice that where the backend has no
        ``sum_scatter`` and there are more than two ranks.
        """
        if not self.is_scattering() and self.size == 2:
            theirs = self.all_gather(row(1 - self.rank))
            length = theirs.size // 2
            start = (1 - self.rank) * length
            return row(self.rank) + theirs[start : start + length]
        all_rows = mx.concatenate([row(r) for r in range(self.size)])
        if self.is_scattering():
            return self._collect(mx.distributed.sum_scatter, all_rows)
        total = self._collect(mx.distributed.all_sum, all_rows)
        length = total.size // self.size
        return total[self.rank * length : (self.rank + 1) * length]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """What each rank gave."""
        sizes: Any = self.all_gather(mx.array([len(data)], mx.uint32)).tolist()
        if max(sizes) == 0:
            return [b""] * self.size
        mine = array_of(data.ljust(max(sizes), b"\0"))
        parts = split(self.all_gather(mine), self.size)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def gather_arrays(
        self, arrays: Sequence[mx.array], bytes_of: Sequence[int], keeps: bool
    ) -> list[mx.array]:
        """The bytes of the arrays of each rank; ``bytes_of`` says how many they are.

        Where ``keeps`` is false, nothing is kept and nothing returned.
        """
        mine = [mx.view(x.reshape(-1), mx.uint8) for x in arrays if x.size > 0]
        most = max(bytes_of)
        missing = most - bytes_of[self.rank]
        flat = mx.concatenate([*mine, mx.zeros(missing, mx.uint8)])
        parts: list[list[mx.array]] = [[] for _ in bytes_of]
        for start in range(0, most, CHUNK):
            chunk = mx.contiguous(flat[start : start + CHUNK])
            found = self.all_gather(chunk).reshape(self.size, -1)
            if keeps:
                for part, own in zip(parts, found, strict=True):
                    part.append(own)
        if not keeps:
            return []
        return [
            mx.concatenate([*part, mx.zeros(0, mx.uint8)])[:size]
            for part, size in zip(parts, bytes_of, strict=True)
        ]

    def gather_number(self, number: mx.array) -> mx.array:
        """A float64 scalar of each rank."""
        with mx.stream(mx.cpu):
            number = number.astype(mx.float64).reshape(1)
            if self._is_lazy:
                return self.all_gather(number)
            frames = self._exchange(struct.pack("d", number.item()), None, "")
            return mx.array([struct.unpack_from("d", x)[0] for x in frames], mx.float64)

    def agree(self, lines: Sequence[str], error: Exception | None = None) -> None:
        """Raise on all ranks if their lines differ, or if one has an error.

        Raises:
            RanksDifferError: A ValueError that names the first difference.
            Exception: On the rank that has it, its own error.
        """
        text = "\n".join(lines)
        if error is not None:
            text = f"{type(error).__name__}: {error}"
        frames = self._exchange(sha256(text.encode()).digest(), error, text)
        if len({*frames}) == 1:
            return
        texts = [x.decode().split("\n") for x in self.gather_bytes(text.encode())]
        other = next(i for i, x in enumerate(texts) if x != texts[0])
        for pair in zip_longest(texts[0], texts[other], fillvalue="nothing"):
            if pair[0] != pair[1]:
                raise RanksDifferError(
                    f"{self._doing}: ranks differ. Rank 0 has {pair[0]}; rank {other} "
                    f"has {pair[1]}"
                )

    def _exchange(
        self, payload: bytes, error: Exception | None, text: str
    ) -> list[bytes]:
        """The ranks' frames; where one has an error, all raise.

        All small messages have one size: a rank that has an error meets the others,
        wherever they are in a step.
        """
        frame = payload.ljust(FRAME) + bytes([error is not None])
        found = self.all_gather(array_of(frame))
        frames = split(found, self.size)
        wrong = [i for i, x in enumerate(frames) if x[-1]]
        if not wrong:
            return frames
        texts = self.gather_bytes(text.encode())
        if error is not None:
            self._refused = error
            raise error
        raise RanksDifferError(
            f"{self._doing}: rank {wrong[0]} refused it. {texts[wrong[0]].decode()}"
        )


def array_of(data: bytes) -> mx.array:
    view: Any = memoryview(data)
    return mx.array(view)


def split(rows: mx.array, count: int) -> list[bytes]:
    """The bytes of each row."""
    data = bytes(memoryview(rows))  # type: ignore[arg-type]
    size = len(data) // count
    return [data[i * size : (i + 1) * size] for i in range(count)]


class RanksDifferError(ValueError):
    """An error that all ranks raise, so that they go on together."""
