"""Which rank has which piece of which parameter, and what is sent together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

# Tensors begin at multiples of this in a bucket, and rows end at them: no block of
# codes is cut, whatever the number of ranks, and vectors of a kernel are aligned.
ALIGNMENT = 64

# Below, codes are rare: their states are balanced apart from those of matrices.
LARGE = 4096


class Tensor(NamedTuple):
    """A parameter. The optimizers of one part see it as they would on one machine."""

    path: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    part: int
    is_elementwise: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Piece(NamedTuple):
    """Elements of a flattened tensor, or a whole tensor in its shape.

    Attributes:
        key: The name under which the optimizer holds it: the tensor's path, and where
            that tensor is cut into several buckets the first element too.
        tensor: The tensor's number.
        begin: The first element.
        end: One more than the last.
        is_whole: Whether it keeps its shape.
    """

    key: str
    tensor: int
    begin: int
    end: int
    is_whole: bool

    def of(self, array: mx.array) -> mx.array:
        """The piece of a whole array."""
        return array if self.is_whole else array.reshape(-1)[self.begin : self.end]


class Span(NamedTuple):
    """Where a piece lies in a buffer of rows."""

    piece: Piece
    row: int
    offset: int  # in the row

    @property
    def size(self) -> int:
        return self.piece.end - self.piece.begin


class Bucket(NamedTuple):
    """What is sent together: pieces of one dtype, a row for each rank."""

    rows: list[list[Piece]]

    def of_tensors(self, chosen: Iterable[int]) -> Bucket:
        wanted = {*chosen}
        return Bucket([[p for p in row if p.tensor in wanted] for row in self.rows])

    @property
    def tensors(self) -> list[int]:
        return [*dict.fromkeys(piece.tensor for row in self.rows for piece in row)]

    @property
    def length(self) -> int:
        """Elements of a row."""
        return max(sum(padded(p.end - p.begin) for p in row) for row in self.rows)

    def spans(self) -> Iterator[Span]:
        for number, row in enumerate(self.rows):
            offset = 0
            for piece in row:
                yield Span(piece, number, offset)
                offset += padded(piece.end - piece.begin)

    def rows_of(
        self, flat: Mapping[int, mx.array], dtype: mx.Dtype
    ) -> Callable[[int], mx.array]:
        """The rows of flattened tensors, by their numbers."""
        return lambda number: self.row(
            number, lambda piece: flat[piece.tensor][piece.begin : piece.end], dtype
        )

    def row(
        self, number: int, array_of: Callable[[Piece], mx.array], dtype: mx.Dtype
    ) -> mx.array:
        """A rank's row of a buffer, of what each piece is in it."""
        arrays: list[mx.array] = []
        missing = self.length
        for piece in self.rows[number]:
            size = piece.end - piece.begin
            arrays.append(array_of(piece).reshape(-1))
            if padded(size) > size:
                arrays.append(mx.zeros(padded(size) - size, dtype))
            missing -= padded(size)
        if missing > 0:
            arrays.append(mx.zeros(missing, dtype))
        return mx.concatenate(arrays)


class Run(NamedTuple):
    """Elements of a tensor that lie together in a buffer of all rows."""

    tensor: int
    begin: int  # the first element, of the tensor
    position: int  # and of the buffer
    size: int


def runs_of(bucket: Bucket) -> list[Run]:
    """Where the buffer has the tensors: each in one run, unless rows have gaps."""
    runs: list[Run] = []
    last: dict[int, int] = {}  # of each tensor
    for piece, row, offset in bucket.spans():
        size = piece.end - piece.begin
        run = Run(piece.tensor, piece.begin, row * bucket.length + offset, size)
        before = runs[last[run.tensor]] if run.tensor in last else None
        if before is not None and before.position + before.size == run.position:
            runs[last[run.tensor]] = before._replace(size=before.size + size)
        elif size > 0:
            last[run.tensor] = len(runs)
            runs.append(run)
    return runs


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def buckets_of(tensors: Sequence[Tensor], ranks: int, bucket_size: int) -> list[Bucket]:
    """The buckets: the same on each rank, of the same tensors."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        is_flat = tensor.is_elementwise and tensor.size > 0
        state = (tensor.part, tensor.size >= LARGE) if is_flat else None
        kinds[tensor.dtype, state].append(number)
    loads = [0] * ranks
    buckets: list[Bucket] = []
    for (dtype, state), numbers in kinds.items():
        unit = ALIGNMENT * ranks
        capacity = max(bucket_size // dtype.size // unit, 1) * unit
        if state is None:
            buckets += _owned(tensors, numbers, loads, capacity // ranks)
        else:
            buckets += _flat(tensors, numbers, ranks, capacity)
    return buckets


def _flat(
    tensors: Sequence[Tensor], numbers: list[int], ranks: int, capacity: int
) -> Iterator[Bucket]:
    """Tensors one after the other, cut into rows of one length."""
    pending: list[Piece] = []
    used = 0
    for number in numbers:
        path, size = tensors[number].path, tensors[number].size
        if used > 0 and used + padded(size) > capacity:
            yield _cut(pending, used, ranks)
            pending, used = [], 0
        for begin in range(0, size, capacity):
            if used > 0 and begin > 0:
                yield _cut(pending, used, ranks)
                pending, used = [], 0
            end = min(begin + capacity, size)
            key = path if size <= capacity else f"{path}@{begin}"
            pending.append(Piece(key, number, begin, end, False))
            used += padded(end - begin)
    if pending:
        yield _cut(pending, used, ranks)


def _cut(pieces: list[Piece], used: int, ranks: int) -> Bucket:
    length = padded(-(-used // ranks))
    rows: list[list[Piece]] = [[] for _ in range(ranks)]
    start = 0
    for piece in pieces:
        for number, row in enumerate(rows):
            begin = max(number * length - start, 0)
            end = min((number + 1) * length - start, piece.end - piece.begin)
            if begin < end:
                row.append(
                    piece._replace(begin=piece.begin + begin, end=piece.begin + end)
                )
        start += padded(piece.end - piece.begin)
    return Bucket(rows)


def _owned(
    tensors: Sequence[Tensor], numbers: list[int], loads: list[int], capacity: int
) -> Iterator[Bucket]:
    """Whole tensors, the largest first to the rank that has least."""
    owner: dict[int, int] = {}
    for number in sorted(numbers, key=lambda n: -tensors[n].size):
        owner[number] = loads.index(min(loads))
        loads[owner[number]] += tensors[number].size
    pending: list[list[Piece]] = [[] for _ in loads]
    for number in numbers:
        path, size = tensors[number].path, tensors[number].size
        pending[owner[number]].append(Piece(path, number, 0, size, True))
    while any(pending):
        rows: list[list[Piece]] = [[] for _ in loads]
        for row, left in zip(rows, pending, strict=True):
            used = 0
            while left and (not row or used + padded(left[0].end) <= capacity):
                used += padded(left[0].end)
                row.append(left.pop(0))
        yield Bucket(rows)
