"""How many keys a query keeps of those that it may see."""

from __future__ import annotations

import math

from torch import Tensor

# A share such as 0.07 is a little off in binary, and 0.07 * 100 comes out a little over 7: a few units in the last
# place are taken off before a part of a key counts as a whole one.
_EXACT = 1 - 2.0**-50


def check(where: str, top: int | None, density: float | None) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless one of the two is given and makes sense."""
    if (top is None) == (density is None):
        both = "neither top nor density is" if top is None else f"top is {top} and density is {density}, both are"
        raise ValueError(f"{where}: {both} given, expected one of them")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int)):
        raise TypeError(
            f"{where}: top is a {type(top).__name__} ({top!r}), expected an integer (a share is a density=)"
        )
    if top is not None and top < 1:
        raise ValueError(f"{where}: top is {top}, expected at least 1: a row keeps its best key")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"{where}: density is {density}, expected a share above 0 and at most 1")


def kept(visible: Tensor, top: int | None, density: float | None) -> Tensor:
    """How many of ``visible`` keys, int64 of any shape, a query keeps: at least 1 unless it may see none."""
    if top is not None:
        return visible.clamp(max=top)
    assert density is not None
    return (visible.double() * (density * _EXACT)).ceil().long()


def most(n: int, top: int | None, density: float | None) -> int:
    """The same for the number of keys of a call: the most that a query keeps."""
    if top is not None:
        return min(n, top)
    assert density is not None
    return math.ceil(n * (density * _EXACT))
