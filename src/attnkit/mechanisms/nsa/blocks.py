"""The two ways in which NSA cuts a sequence: overlapping blocks that are compressed, and blocks that are selected."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attnkit.mechanisms.moba import selected_pairs
from attnkit.state.pooled import pools


class Blocks(NamedTuple):
    """Tokens of a compressed block, from one to the next, of a selection block; how many of these a query selects."""

    length: int
    stride: int
    block: int
    selected: int

    def compressed(self, tokens: int) -> int:
        """How many compressed blocks end within the first ``tokens`` tokens."""
        return pools(tokens, self.length, self.stride)

    def pairs(self, tokens: int) -> int:
        """Compressed blocks and selected tokens that the first ``tokens`` positions look at."""
        steps, rest = divmod(max(0, tokens - self.length + 1), self.stride)
        seen = self.stride * steps * (steps + 1) // 2 + rest * (steps + 1)
        return seen + selected_pairs(tokens, self.block, self.selected)


def forced(number: Tensor, own: Tensor) -> Tensor:
    """Which blocks are always selected, as far as the query may see them: the first one, its own and its neighbours."""
    return (number == 0) | ((number - own).abs() <= 1)


def check(where: str, blocks: Blocks, window: int, causal: bool) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless these can be cut and selected."""
    for name, value in {**blocks._asdict(), "window": window}.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{where}: {name} is a {type(value).__name__} ({value!r}), expected an integer")
        least = 1 if name != "selected" else 3 if causal else 4
        if value < least:
            why = ": the first block, the own one and its neighbours always are" if name == "selected" else ""
            raise ValueError(f"{where}: {name} is {value}, expected at least {least}{why}")
    for name in ("length", "block"):
        size = getattr(blocks, name)
        if size % blocks.stride:
            raise ValueError(f"{where}: {name} is {size} and stride {blocks.stride}, expected a multiple of the stride")


def windows(x: Tensor, length: int, stride: int) -> Tensor:
    """The tokens of each complete block of ``x`` ``(b, g, n, d)``, overlapping: ``(b, g, c, length, d)``."""
    if x.shape[2] < length:
        return x.new_zeros(*x.shape[:2], 0, length, x.shape[3])
    return x.unfold(2, length, stride).transpose(-1, -2)
