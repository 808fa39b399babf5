"""The sets of tensors that a step updates."""

Shapes = list[tuple[int, ...]]


def decoder(
    width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024
) -> Shapes:
    """A decoder of GPT-2's layout; by default 124M parameters in 148 tensors."""
    layer: Shapes = [
        *[(width,)] * 2,  # norm
        *[(3 * width, width), (3 * width,)],
        *[(width, width), (width,)],
        *[(width,)] * 2,  # norm
        *[(4 * width, width), (4 * width,)],
        *[(width, 4 * width), (width,)],
    ]
    ends: Shapes = [(vocabulary, width), (context, width), (width,), (width,)]
    return [*ends, *layer * layers]


def adapters(width: int = 768, rank: int = 8, pairs: int = 128) -> Shapes:
    """Low-rank adapters: thin matrices, two for each layer that is adapted."""
    return [(width, rank), (rank, width)] * pairs


SETS: dict[str, tuple[str, Shapes]] = {
    "large": ("8 matrices of 4096 x 1024", [(4096, 1024)] * 8),
    "decoder": ("a 124M decoder's 148 tensors", decoder()),
    "adapters": ("256 rank-8 adapters", adapters()),
    "small": ("800 vectors of 32", [(32,)] * 800),
}


def elements(shapes: Shapes) -> int:
    """Parameters in all."""
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total
