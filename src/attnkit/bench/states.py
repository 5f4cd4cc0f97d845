"""Decoding states for the bench, each kind made in one place; a kind that this attnkit lacks is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

import attnkit
from attnkit import state


def filled(kind: str, k: Tensor, v: Tensor) -> Any:
    """A state of that kind which holds keys ``(b, g, n, d)`` and values ``(b, g, n, e)``.

    Raises ``NotImplementedError`` when there is no such state. Looked up by name: with ``--base`` this runs over other
    commits as well.
    """
    made = KINDS[kind](k, v)
    made.append(k, v)
    return made


def step(q: Tensor, held: Any) -> Callable[[], Tensor]:
    """The call that attends with queries ``(b, h, m, d)``, the newest tokens, to all that the state holds."""
    return partial(_named(attnkit, "softmax_attention_step"), q, held)


def held(made: Any) -> tuple[Tensor, Tensor]:
    """The keys and values that a state stands for: those of a quantised one in the float32 that it decodes to."""
    if isinstance(made, state.KVState) and hasattr(made, "numbers"):
        k, v = made.numbers()
        return k, v
    view = made.view()
    return view.k, view.v


def _contiguous(codec: str | None, k: Tensor, v: Tensor) -> Any:
    b, g, n, d = k.shape
    options: dict[str, Any] = {} if codec is None else {"codec": codec}
    try:
        return state.KVState(b, g, n, d, v.shape[3], dtype=k.dtype, **options)
    except TypeError as error:
        raise NotImplementedError(f"this attnkit's KVState has no codec {codec!r}") from error


def _paged(page: int, k: Tensor, v: Tensor) -> Any:
    b, g, n, d = k.shape
    pool = _named(state, "PagePool")(b * -(-n // page), page, g, d, v.shape[3], dtype=k.dtype)
    return _named(state, "PagedKVState")(pool, b)


def _named(module: Any, name: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise NotImplementedError(f"this attnkit has no {name}")
    return found


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pages of 16": partial(_paged, 16),
    "pages of 64": partial(_paged, 64),
    "int8": partial(_contiguous, "int8"),
    "int4": partial(_contiguous, "int4"),
    "fp8": partial(_contiguous, "fp8"),
}
