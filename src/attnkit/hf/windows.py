"""The layers of a cache that keep what a window can still see, as numbers or quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.hf.layers import FIRST, CodedLayer, Layer, removed
from attnkit.state import KVState
from attnkit.state.codec import GROUP, Codec

_STEP = 2 * GROUP  # tokens that a quantised window lets go of at a time: then int4 keys that wait stay in their slots


class WindowLayer(Layer):
    """The last ``window`` tokens, in order, in a buffer of up to twice as many.

    When the buffer is full the newest ``window - 1`` tokens move to its front: one token moved for each token added,
    and keys always lie in the order of their positions, so that every mask can be applied to them.
    """

    is_sliding = True

    def __init__(self, window: int, dtype: torch.dtype | None = None, max_length: int | None = None) -> None:
        super().__init__(dtype, max_length)
        self.sliding_window, self.record_past = int(window), False
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._first = self._held = 0  # position of the token in slot 0, and how many slots hold a token
        self._since = 0  # while the past is recorded, what a query at this position sees is kept

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in self._buffers or ())

    def activate_past_recording(self) -> None:
        """Keep what ``crop`` may go back to, until it is called."""
        self.record_past, self._since = True, self.get_seq_length()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for sequences and heads like those of ``key_states`` ``(b, g, m, d)``."""
        self._buffers, self._first, self._held = None, 0, 0
        self._grow(min(FIRST, 2 * self.sliding_window), key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys ``(b, g, m, d)`` and values ``(b, g, m, e)``; return those that the new tokens may see."""
        m, length = key_states.shape[2], self.get_seq_length()
        self._check(key_states, value_states, length + m)
        if self._buffers is None or (length == 0 and self._buffers[0].shape[0] != key_states.shape[0]):
            self.lazy_initialization(key_states, value_states)
        assert self._buffers is not None
        before = min(length, self.sliding_window - 1)
        kept = before
        if self.record_past:
            kept = self._held - max(0, min(self._since, length) - (self.sliding_window - 1) - self._first)
        if self._held + m > self._buffers[0].shape[2]:
            if kept + m > 2 * self.sliding_window and not self.record_past:
                return self._replace(key_states, value_states, before)
            self._make_room(kept, m, key_states, value_states)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._held : self._held + m] = new
        self._held += m
        self.keys, self.values = (b[:, :, self._held - before - m : self._held] for b in self._buffers)
        return self.keys, self.values

    def _replace(self, k: Tensor, v: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """More new tokens than fit, as in a prefill: hand them on as they came, keep the last."""
        assert self._buffers is not None
        m, length = k.shape[2], self.get_seq_length()
        kept = min(before + m, self.sliding_window - 1)
        seen = []
        for i, new in enumerate((k, v)):
            buffer = self._buffers[i]
            seen.append(torch.cat([buffer[:, :, self._held - before : self._held], new], 2) if before else new)
        self._first, self._held = length + m - kept, 0
        if kept > self._buffers[0].shape[2]:
            self._grow(2 * self.sliding_window, k, v)
        for buffer, new in zip(self._buffers, seen, strict=True):
            buffer[:, :, :kept] = new[:, :, new.shape[2] - kept :]
        self._held = kept
        self.keys, self.values = seen
        return seen[0], seen[1]

    def _make_room(self, kept: int, m: int, k: Tensor, v: Tensor) -> None:
        """Move the newest ``kept`` tokens to the front of a buffer with room for ``m`` more."""
        assert self._buffers is not None
        capacity = self._buffers[0].shape[2]
        self._first, low = self.get_seq_length() - kept, self._held - kept
        moved = [buffer[:, :, low : self._held].clone() for buffer in self._buffers]
        if kept + m > capacity or (capacity < 2 * self.sliding_window and kept > capacity // 2):
            bound = kept + m if self.record_past else 2 * self.sliding_window
            self._held = 0
            self._grow(max(kept + m, min(2 * capacity, max(bound, 2 * self.sliding_window))), k, v)
        for buffer, old in zip(self._buffers, moved, strict=True):
            buffer[:, :, :kept] = old
        self._held = kept

    def _grow(self, capacity: int, k: Tensor, v: Tensor) -> None:
        with torch.inference_mode(False):
            one, other = (x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in (k, v))
        self._buffers = one, other

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that ``query_length`` more tokens attend to, and the position of the first."""
        before = min(self.get_seq_length(), self.sliding_window - 1)
        return before + query_length, self.get_seq_length() - before

    def get_seq_length(self) -> int:
        """Tokens seen, those let go of included."""
        return self._first + self._held

    def get_max_length(self) -> int:
        """Tokens kept."""
        return self.sliding_window

    def reset(self) -> None:
        """Forget every token and keep the buffers."""
        self._first = self._held = self._since = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; refused where the next query would see tokens let go of."""
        length = self.get_seq_length()
        left = removed(tokens_to_remove, length)
        _check_window(left, length, self.sliding_window, self._first)
        self._held, self._since = left - self._first, left

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` becomes a copy of sequence ``beam_idx[i]``."""
        for buffer in self._buffers or ():
            _reorder(buffer[:, :, : self._held], beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        if self._buffers is not None:
            self.batch_select_indices(torch.arange(self._buffers[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, in that order."""
        if self._buffers is not None:
            one, other = (buffer.index_select(0, indices.to(buffer.device)) for buffer in self._buffers)
            self._buffers = one, other


class CodedWindowLayer(CodedLayer):
    """The last tokens, quantised, in a buffer of at least twice the window: all that it holds are handed on as codes.

    When the buffer is full, the codes of what can still be seen move to a new one as they are. Tokens are let go of by
    64, so that int4 keys stay in their groups; the mask hides those that are outside of the window and still there.
    """

    is_sliding = True

    def __init__(self, codec: Codec, window: int, max_length: int | None = None) -> None:
        super().__init__(codec, max_length)
        self.sliding_window, self.record_past = int(window), False
        self._first = 0  # position of the first token held
        self._since = 0  # while the past is recorded, what a query at this position sees is kept

    def activate_past_recording(self) -> None:
        """Keep what ``crop`` may go back to, until it is called."""
        super().activate_past_recording()
        self.record_past, self._since = True, self.get_seq_length()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for sequences and heads like those of ``key_states`` ``(b, g, m, d)``."""
        self._first = 0
        with torch.inference_mode(False):
            most = max(min(FIRST, 2 * self.sliding_window + _STEP), key_states.shape[2])
            self.state = self._made(most, key_states, value_states)
        self.is_initialized = True

    @property
    def _tokens(self) -> int:
        return self.state.length if self.state is not None else 0

    def _room(self, m: int) -> tuple[int, int]:
        """How many tokens are let go of before ``m`` more are stored, and how many there has to be room for then."""
        capacity = self.state.capacity if isinstance(self.state, KVState) else 0
        held, most = self._tokens, 2 * self.sliding_window + _STEP
        if held + m <= most:
            return 0, capacity if held + m <= capacity <= most else min(most, max(2 * capacity, held + m))
        length = self.get_seq_length()
        oldest = (min(self._since, length) if self.record_past else length) - (self.sliding_window - 1)
        dropped = max(0, oldest - self._first) // _STEP * _STEP
        needed = max(most, held - dropped + m)
        return dropped, needed if dropped else max(needed, capacity)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys ``(b, g, m, d)`` and values ``(b, g, m, e)``; return all held, which the mask is for."""
        m, before = key_states.shape[2], self.get_seq_length()
        self._check(key_states, value_states, before + m)
        if self.state is None or (before == 0 and self._batch != key_states.shape[0]):
            self.lazy_initialization(key_states, value_states)
        assert isinstance(self.state, KVState)
        dropped, capacity = self._room(m)
        if dropped or capacity != self.state.capacity:
            with torch.inference_mode(False):
                self.state = self.state.grown(capacity, dropped)
            self._first += dropped
        self._store(key_states, value_states)
        return self._seen(key_states, value_states, before)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that ``query_length`` more tokens attend to, and the position of the first."""
        dropped, _ = self._room(query_length)
        return self._tokens - dropped + query_length, self._first + dropped

    def get_seq_length(self) -> int:
        """Tokens seen, those let go of included."""
        return self._first + self._tokens

    def get_max_length(self) -> int:
        """Tokens that are seen."""
        return self.sliding_window

    def reset(self) -> None:
        """Forget every token and keep the buffers."""
        if self.state is not None:
            self.state.crop(0)
        self._first = self._since = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; refused where the next query would see tokens let go of."""
        length = self.get_seq_length()
        left = removed(tokens_to_remove, length)
        _check_window(left, length, self.sliding_window, self._first)
        if self.state is not None:
            self.state.crop(left - self._first)
        self._since = left


def _check_window(left: int, length: int, window: int, first: int) -> None:
    """Raise where a query after ``left`` of ``length`` tokens would see some before ``first``, the first one held."""
    if left < length and max(0, left - (window - 1)) < first:
        raise ValueError(
            f"Cache cannot go back from {length} to {left} tokens, a window of {window} has let go of those before "
            f"{first}: call activate_past_recording() before the tokens that may be cropped"
        )


def _reorder(held: Tensor, rows: Tensor) -> None:
    rows = rows.to(held.device)
    if not torch.equal(rows, torch.arange(held.shape[0], device=held.device)):
        held.copy_(held.index_select(0, rows))
