"""From the mask functions of Transformers to our masks, and how a mask travels through a model.

Transformers describes a mask by a Python function of four indices, put together from closures by ``and_masks`` and
``or_masks``. Those it makes itself are recognised by their code and translated; any other is evaluated to a dense mask.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import masking_utils as theirs

from attnkit.hf.carried import Carried
from attnkit.masks import UNBOUNDED, Mask, causal, chunked, documents, explicit, full, padding
from attnkit.masks.patterns import Interval

# What a model may do to a mask of truth values: cut, repeat and combine it, and choose by it. Code written for a mask
# of numbers to add would be wrong without a sign of it (0 means visible there, and hidden here): all else is refused.
_KEEPS_TRUTH = frozenset(
    """
    _to_copy _unsafe_view all any bitwise_and bitwise_not bitwise_or clone expand flatten gather index index_select
    logical_and logical_not logical_or masked_fill permute repeat reshape select slice split squeeze transpose unbind
    unsqueeze view where
    """.split()
)


class CarriedMask(Carried):
    """One of our masks dressed as a bool tensor ``(b, 1, m, n)`` without its numbers, to travel through a model.

    Models test a mask for None, take a slice that is all of it, move it to a device; all that leaves it whole. An
    operation that needs its numbers makes a plain dense tensor of it; arithmetic is refused.

    Attributes
    ----------
    mask: what may be seen by ``m`` queries over the first ``keys`` keys, aligned bottom-right.
    keys: how many keys there are; the rest, up to ``n``, is the room of a static cache that nobody has filled.
    window: the causal window in the mask, when it has one.
    later: whether it can show a key after the query.
    """

    mask: Mask
    keys: int
    window: int | None
    later: bool

    @staticmethod
    def __new__(
        cls, mask: Mask, shape: tuple[int, ...], keys: int, device: Any, window: int | None, later: bool = True
    ) -> CarriedMask:
        made: CarriedMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        made.mask, made.keys, made.window, made.later = mask, keys, window, later
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # theirs has no types
        return f"CarriedMask({self.mask!r}, shape={tuple(self.shape)}, keys={self.keys})"

    def again(self, device: Any) -> CarriedMask:
        return CarriedMask(self.mask, tuple(self.shape), self.keys, device, self.window, self.later)

    def dense(self) -> Tensor:
        """The same as a plain bool tensor ``(b, 1, m, n)``; keys past ``keys`` are hidden."""
        m, n = self.shape[-2:]
        keep = self.mask.dense(m, self.keys, self.device)
        return torch.nn.functional.pad(keep, (0, n - self.keys)).expand(self.shape[0], -1, m, n)

    def refuse(self, name: str, kwargs: dict[str, Any]) -> None:
        """Raise unless what the operation computes with truth values is right."""
        if name not in _KEEPS_TRUTH or kwargs.get("dtype") not in (None, torch.bool):
            raise NotImplementedError(
                f"the model computes {name} with its attention mask, which attnkit hands over as truth values: "
                "use attn_implementation='eager' for this model"
            )


@dataclass(frozen=True)
class _Frame:
    """Where the call stands: the first ``keys`` keys begin at ``offset``; packed ones have their own ``positions``."""

    offset: int
    keys: int
    positions: Tensor | None = None

    def of_keys(self, held: Tensor) -> Tensor:
        """What a tensor ``(b, length)`` by absolute position says of the keys; zeros where it ends early."""
        end = self.offset + self.keys
        return torch.nn.functional.pad(held, (0, max(0, end - held.shape[-1])))[:, self.offset : end]


@dataclass(frozen=True)
class _Reading:
    """A translated mask; ``later``: it can show keys after the query; ``placed``: it asks where queries are."""

    mask: Mask
    later: bool
    placed: bool = True
    window: int | None = None


def _both(one: _Reading, other: _Reading) -> _Reading:
    """What both show; two intervals stay one, because kernels know those without a list of blocks."""
    first, second = one.mask.interval(), other.mask.interval()
    if first and second:
        mask: Mask = Interval(min(first[0], second[0]), min(first[1], second[1]))
    elif first == (UNBOUNDED, UNBOUNDED) or second == (UNBOUNDED, UNBOUNDED):
        mask = other.mask if first else one.mask
    else:
        mask = one.mask & other.mask
    windows = [w for w in (one.window, other.window) if w is not None]
    return _Reading(mask, one.later and other.later, one.placed or other.placed, min(windows, default=None))


def _either(one: _Reading, other: _Reading) -> _Reading:
    return _Reading(one.mask | other.mask, one.later or other.later, one.placed or other.placed)


def _held(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure holds."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _read(function: Callable[..., Any], frame: _Frame) -> _Reading | None:
    """Translate a mask function of Transformers; None for one that Transformers did not make."""
    if function is theirs.causal_mask_function:
        return _Reading(causal(), later=False)
    if function is theirs.bidirectional_mask_function:
        return _Reading(full(), later=True, placed=False)
    reader = _readers().get(getattr(function, "__code__", None))
    return reader(_held(function), frame) if reader else None


def _and(held: dict[str, Any], frame: _Frame) -> _Reading | None:
    functions = list(held["mask_functions"])
    packed = [_held(f)["packed_sequence_mask"] for f in functions if _made_by(f, "packed_sequence_mask_function")]
    found = [
        _read_packed(f, packed[0], frame)
        if packed and _made_by(f, "remap_positions_for_packed_sequence")
        else _read(f, frame)
        for f in functions
    ]
    read = [r for r in found if r is not None]
    return functools.reduce(_both, read) if len(read) == len(found) else None


def _or(held: dict[str, Any], frame: _Frame) -> _Reading | None:
    found = [_read(f, frame) for f in held["mask_functions"]]
    read = [r for r in found if r is not None]
    return functools.reduce(_either, read) if len(read) == len(found) else None


def _read_packed(function: Callable[..., Any], ids: Tensor, frame: _Frame) -> _Reading | None:
    """A mask of positions that restart in each packed document, beside a mask that keeps documents apart.

    Within a document both count up by one, so a mask of distances reads the same by either.
    """
    held = _held(function)
    positions = held["position_ids"]
    if frame.offset or not positions.shape[-1] == ids.shape[-1] == frame.keys:
        return None
    inside = ids.diff() == 0
    if bool((ids.diff() < 0).any()) or bool((inside & (positions.diff() != 1)).any()):
        return None
    return _read(held["mask_function"], _Frame(frame.offset, frame.keys, positions))


def _packed(held: dict[str, Any], frame: _Frame) -> _Reading:
    return _Reading(documents(frame.of_keys(held["packed_sequence_mask"])), later=True)


def _window(held: dict[str, Any], frame: _Frame) -> _Reading:
    size = int(held["sliding_window"])
    return _Reading(Interval(size - 1, UNBOUNDED), later=True, window=size)


def _two_sided_window(held: dict[str, Any], frame: _Frame) -> _Reading:
    radius = int(held["sliding_window"])
    return _Reading(Interval(radius, radius), later=True)


def _chunks(held: dict[str, Any], frame: _Frame) -> _Reading:
    size, shift = int(held["chunk_size"]), held["left_padding"]
    if frame.positions is None and frame.offset % size == 0 and not bool(shift.any()):
        return _Reading(chunked(size), later=True)
    positions = frame.positions
    if positions is None:
        positions = torch.arange(frame.offset, frame.offset + frame.keys, device=shift.device)[None]
    return _Reading(documents((positions - shift[:, None]).div(size, rounding_mode="floor")), later=True)


def _blocks(held: dict[str, Any], frame: _Frame) -> _Reading:
    ids = frame.of_keys(held["block_sequence_ids"] + 1) - 1  # past the end of the ids there is no block, which is -1
    return _Reading(documents(ids) & padding(ids >= 0), later=True)


def _padded(held: dict[str, Any], frame: _Frame) -> _Reading:
    keep = frame.of_keys(held["padding_mask"].bool())
    return _Reading(full() if bool(keep.all()) else padding(keep), later=True, placed=False)


@functools.cache
def _readers() -> dict[Any, Callable[[dict[str, Any], _Frame], _Reading | None]]:
    """Who reads which closure, by the code object that all closures of one factory share."""
    return {
        _code("and_masks"): _and,
        _code("or_masks"): _or,
        _code("sliding_window_overlay"): _window,
        _code("sliding_window_bidirectional_overlay"): _two_sided_window,
        _code("chunked_overlay"): _chunks,
        _code("blockwise_overlay"): _blocks,
        _code("packed_sequence_mask_function"): _packed,
        _code("padding_mask_function"): _padded,
    }


@functools.cache
def _code(factory: str) -> Any:
    """The code of the closures that ``factory`` makes; of none where Transformers is too old to have it."""
    if not hasattr(theirs, factory):
        return object()
    some: Any = torch.zeros(1, 1, dtype=torch.int64)
    arguments = {
        "and_masks": (),
        "or_masks": (),
        "chunked_overlay": (1, some),
        "remap_positions_for_packed_sequence": (theirs.causal_mask_function, some),
    }
    return getattr(theirs, factory)(*arguments.get(factory, (some,))).__code__


def _made_by(function: Callable[..., Any], factory: str) -> bool:
    return getattr(function, "__code__", None) is _code(factory)


def translate(
    function: Callable[..., Any],
    kept: Tensor | None,
    *,
    queries: int,
    keys: int,
    query_offset: int,
    key_offset: int,
) -> tuple[Mask, int, int | None, bool] | None:
    """A mask function and a padding mask ``(b, length)`` as one of our masks, for ``queries`` x ``keys``.

    Returns the mask, how many of the keys it is for (the others are hidden by it), its causal window if it has one, and
    whether it can show keys after the query. None when the function is not one that Transformers makes, or when queries
    are not the last of the keys and it matters.
    """
    whole = function if kept is None else theirs.and_masks(function, theirs.padding_mask_function(kept))
    reached = query_offset - key_offset + queries  # keys up to the last query, where a causal mask ends
    if queries <= reached <= keys:
        read = _read(whole, _Frame(key_offset, reached))
        if read is not None and (reached == keys or not read.later):
            return read.mask, reached, read.window, read.later
    read = _read(whole, _Frame(key_offset, keys))
    return (read.mask, keys, read.window, read.later) if read is not None and not read.placed else None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = theirs.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    config: Any = None,
) -> Tensor:
    """What ``AttentionMaskInterface`` calls: a ``CarriedMask`` ``(b, 1, m, n)``, never None.

    A function that Transformers did not make is evaluated to a dense mask, with a warning, and so is every one while a
    graph is compiled, where an object cannot go along.
    """
    if not torch.compiler.is_compiling():
        found = translate(
            mask_function,
            attention_mask,
            queries=q_length,
            keys=kv_length,
            query_offset=int(q_offset),
            key_offset=int(kv_offset),
        )
        if found is not None:
            mask, keys, window, later = found
            return CarriedMask(mask, (batch_size, 1, q_length, kv_length), keys, torch.device(device), window, later)
    made = theirs.sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        cast(int, q_offset),  # a tensor will do, and while a graph is compiled int() would break it
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    dense = cast(Tensor, made)  # None only where a skip is allowed
    if torch.compiler.is_compiling():
        return dense
    warnings.warn(
        f"attnkit does not know the mask function {getattr(mask_function, '__qualname__', mask_function)!r} and builds "
        f"its {q_length} x {kv_length} mask in full: correct, but slower and larger than the masks it knows",
        stacklevel=2,
    )
    return CarriedMask(explicit(dense), tuple(dense.shape), kv_length, dense.device, None)
