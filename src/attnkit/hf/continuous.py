"""Transformers' own continuous batching on our kernels: what it keeps on its pages is read there, without a copy.

``model.generate_batch`` and ``transformers serve`` join the new tokens of all sequences in one row and say by
``cu_seq_lens`` where each begins. Transformers takes three kinds of attention for that: "sdpa" and eager, for which it
fills a dense mask of tokens x (pages + tokens), and names with "flash" in them, for which it makes none. ``register``
fills such a name; it is set on ``model.config``, since ``set_attn_implementation`` would look for a package behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

from attnkit.hf.accelerate import check_runs_ours
from attnkit.hf.attention import attention, check_window, refuse
from attnkit.hf.batching import check_layers
from attnkit.hf.masks import CarriedMask
from attnkit.masks import Mask, causal, window
from attnkit.mechanisms.softmax import softmax_attention, softmax_attention_step
from attnkit.state import PagedKVState
from attnkit.state.paged import BorrowedPages

SUFFIX = "_flash"
# What a batch says of its pages and its logits; it is the cache and the model that use it.
_BOOKKEEPING = frozenset(
    """
    block_table logits_indices logits_processor_args max_length_k max_length_q read_index write_index
    """.split()
)
_HOOK = "_attnkit_continuous"


@contextlib.contextmanager
def continuous_batching(model: nn.Module) -> Iterator[None]:
    """Let ``model.generate_batch``, and managers that ``model.init_continuous_batching`` makes, run our attention.

    A sequence that takes one token reads its keys and values where they lie on Transformers' pages; one that takes
    several gets a copy of those before them. Afterwards the model is as before. It may not be called in another way
    meanwhile by a thread that expects its former attention.

    Raises
    ------
    ValueError: the model does not run our attention. NotImplementedError: layers of another kind than full and sliding
    attention, or a model with an attention of its own.
    """
    enter(model)
    try:
        yield
    finally:
        leave(model)


def enter(model: Any) -> None:
    """What ``continuous_batching`` does at first; inside another one it does nothing."""
    where = "continuous_batching"
    if hasattr(model, _HOOK):
        raise ValueError(f"{where} got a {type(model).__name__} that is inside another {where}: leave that one first")
    check_runs_ours(model, where)
    check_layers(model, where, ("full_attention", "sliding_attention"))
    if not getattr(model, "_supports_attention_backend", False):
        raise NotImplementedError(
            f"{where} got a {type(model).__name__}, whose attention is its own: use attnkit.hf.generate_batch"
        )
    name = model.config._attn_implementation
    setattr(model, _HOOK, (name, model.register_forward_pre_hook(_read_in_place, with_kwargs=True)))
    model.config._attn_implementation = name + SUFFIX


def leave(model: Any) -> None:
    """Undo ``enter``."""
    name, hook = getattr(model, _HOOK)
    delattr(model, _HOOK)
    hook.remove()
    model.config._attn_implementation = name


def _read_in_place(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before a model's forward: its paged cache stores as we do. One object is changed, which ends with the batch."""
    cache = kwargs.get("cache")
    if isinstance(cache, PagedAttentionCache) and "update" not in vars(cache):
        cache.update = _Update(cache)


@dataclass(frozen=True)
class _Sequence:
    """One that takes new tokens: those from ``first`` on, ``new`` of them, see ``seen`` tokens, themselves included."""

    first: int
    new: int
    seen: int

    @property
    def goes_on(self) -> bool:
        """Whether it takes one token after others, which its pages are read for."""
        return self.seen > self.new == 1


@dataclass(frozen=True)
class _Kept:
    """What the pages of a layer hold for the sequences of a batch, whose new tokens are ``k`` and ``v``.

    ``state`` is of those that go on, in order; ``past`` has what others saw before, by their place in ``sequences``.
    """

    k: Tensor
    v: Tensor
    sequences: list[_Sequence]
    state: PagedKVState | None
    past: dict[int, tuple[Tensor, Tensor]]
    window: int | None


class _Update:
    """Stands in for the ``update`` of one paged cache: it stores the same tokens and makes no copy of the others."""

    def __init__(self, cache: PagedAttentionCache) -> None:
        self.cache = cache
        self._pages: dict[int, BorrowedPages] = {}  # by layer
        self._batch: Any = None
        self._tables: dict[int, list[list[int]]] = {}  # by kind of layer, for this batch

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own has no types
    def __call__(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        """Store keys ``(1, g, m, d)`` and values; leave ``kept`` in ``kwargs``, which go on to the attention."""
        allocator: Any = self.cache.layer_to_allocator[layer_idx]
        kind, index = allocator.layer_type, allocator.index
        read, write = (kwargs[name][index] for name in ("read_index", "write_index"))
        if layer_idx not in self._pages:
            # The method of the parent class: that of sliding layers refuses, because theirs is a ring.
            k_pages, v_pages = FullAttentionCacheAllocator.get_cache_for_block_table(allocator, layer_idx)
            self._pages[layer_idx] = BorrowedPages(k_pages.transpose(1, 2), v_pages.transpose(1, 2))
        pages = self._pages[layer_idx]
        sequences = _sequences(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][kind])
        rows = [pool.transpose(1, 2).flatten(0, 1) for pool in (pages.k, pages.v)]
        past, at = {}, 0
        for i, one in enumerate(sequences):
            if one.seen > one.new > 1:  # copied before a ring is written over
                held = read[at : at + one.seen - one.new]
                k, v = (x.index_select(0, held).transpose(0, 1)[None] for x in rows)
                past[i] = k, v
            at += one.seen
        for x, new in zip(rows, (key_states, value_states), strict=True):
            x.index_copy_(0, write, new[0].transpose(0, 1))
        size = getattr(allocator, "sliding_window", None)
        if kwargs["read_index"] is not self._batch:
            self._batch, self._tables = kwargs["read_index"], {}
        if index not in self._tables:
            self._tables[index] = _tables(sequences, read, write, pages.page, ring=size is not None)
        tables = self._tables[index]
        lengths = [one.seen for one in sequences if one.goes_on]
        state = PagedKVState(pages, len(tables)) if tables else None
        for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            assert state is not None
            state.adopt(row, table, length)
        kwargs["kept"] = _Kept(key_states, value_states, sequences, state, past, size)
        return key_states, value_states


def _sequences(cu_q: Tensor, cu_k: Tensor) -> list[_Sequence]:
    starts, ends = cu_q.tolist(), cu_k.tolist()
    return [
        _Sequence(first, last - first, end - begin)
        for first, last, begin, end in zip(starts, starts[1:], ends, ends[1:], strict=False)
        if last > first  # a batch of a fixed size is filled up with empty ones
    ]


def _tables(sequences: list[_Sequence], read: Tensor, write: Tensor, page: int, *, ring: bool) -> list[list[int]]:
    """The pages of each sequence that goes on. ``read`` and ``write`` say in which slot each token seen and new lies.

    A ring has its tokens in another order, all of which one token sees: only the page that is not full has to be last.
    """
    tables, at = [], 0
    for one in sequences:
        if one.goes_on:
            slots = read[at : at + one.seen]
            if ring:
                slots = torch.cat([slots[:-1], write[one.first : one.first + 1]])
                found, counts = slots.div(page, rounding_mode="floor").unique(return_counts=True)
                tables.append(found[counts.argsort(descending=True, stable=True)].tolist())
            else:
                tables.append(slots[::page].div(page, rounding_mode="floor").tolist())
        at += one.seen
    return tables


def joined_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Any = None,
    kept: _Kept | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """``attention`` for sequences joined in one row; what is not joined goes to ``attention`` as it is.

    Parameters
    ----------
    query: (1, h, tokens, d). key: (1, g, tokens, d). value: (1, g, tokens, e).
    kept: what was stored before, and where.
    cache: the paged cache, where the attention has to update it (Transformers before 5.24).
    cu_seq_lens_q, cu_seq_lens_k: where each sequence begins among the new tokens and among what is seen.
    others: what ``attention`` honours besides is refused here, as is what it refuses.

    Returns
    -------
    o: (1, tokens, h, e), and None for the weights.

    Raises
    ------
    NotImplementedError: an argument that would change the result is not known, or a layer that does not store its keys.
    """
    if cu_seq_lens_q is None:
        others |= {"is_causal": is_causal, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return attention(module, query, key, value, attention_mask, dropout, scaling, **others)
    refuse(module, s_aux, {name: value for name, value in others.items() if name not in _BOOKKEEPING})
    # Before 5.24 a mask is made even so, from positions that restart: what it says the lengths say.
    if dropout or not (attention_mask is None or isinstance(attention_mask, CarriedMask)):
        raise NotImplementedError("attnkit joins sequences without dropout and without a mask of the caller's")
    if cache is not None:
        arguments: dict[str, Any] = {
            **{name: others[name] for name in ("read_index", "write_index")},
            **{"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k},
        }
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=getattr(module, "layer_idx", None), kwargs=arguments
        )
        kept = arguments.get("kept")
    if kept is None or key is not kept.k or value is not kept.v:
        raise NotImplementedError(
            f"{type(module).__name__} attends to other keys than those it stored in the batch's cache: use "
            "attnkit.hf.generate_batch"
        )
    check_window(sliding_window, kept.window, max((one.seen for one in kept.sequences), default=0))
    mask: Mask = causal() if kept.window is None else window(kept.window)
    o = query.new_zeros(*query.shape[:3], value.shape[3])
    if kept.state is not None:
        rows = [one.first for one in kept.sequences if one.goes_on]
        q = query[0][:, rows].transpose(0, 1)[:, :, None]
        # All that a sequence holds is seen: a ring holds no more than its window.
        seen = softmax_attention_step(q, kept.state, scale=scaling, softcap=softcap, sink=s_aux)
        o[0][:, rows] = seen[:, :, 0].transpose(0, 1)
    for i, one in enumerate(kept.sequences):
        if one.goes_on:
            continue
        q, k, v = (x[:, :, one.first : one.first + one.new] for x in (query, key, value))
        if i in kept.past:
            k, v = (torch.cat(pair, 2) for pair in zip(kept.past[i], (k, v), strict=True))
        o[:, :, one.first : one.first + one.new] = softmax_attention(
            q, k, v, mask=mask, scale=scaling, softcap=softcap, sink=s_aux
        )
    return o.transpose(1, 2).contiguous(), None
