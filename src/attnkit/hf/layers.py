"""The layers of a cache: where keys and values lie, and what is handed on to attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import cache_utils as theirs

from attnkit.hf.carried import carried
from attnkit.state import KVState, LatentState, PagedKVState, PagePool
from attnkit.state.codec import Codec
from attnkit.state.tokens import TokenState

FIRST = 256  # tokens of a buffer that nobody gave a size
PAGE = 64  # tokens of a page


class Layer(theirs.CacheLayerMixin):
    """What both kinds of layer check and say."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, dtype: torch.dtype | None, max_length: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stored, self.max_length = dtype, max_length  # the first has a name that no class of theirs uses

    def _check(self, k: Tensor, v: Tensor, length: int) -> None:
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise NotImplementedError(
                "Cache is written in place and has no gradient: decode under torch.no_grad() and train with "
                "use_cache=False"
            )
        if self.stored not in (None, k.dtype):
            raise NotImplementedError(
                f"Cache stores {self.stored} and the model computes {k.dtype}: load the model in {self.stored}, or "
                "leave dtype out"
            )
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"Cache was made for {self.max_length} tokens and the sequence has reached {length}: make it with "
                f"max_length={length} or more; what it holds is unchanged"
            )

    def offload(self) -> None:
        """Refused."""
        raise NotImplementedError("Cache cannot be offloaded: use Transformers' DynamicCache(offloading=True)")

    prefetch = offload


def removed(tokens: int, length: int) -> int:
    """Tokens left after ``crop(tokens)``, which Transformers calls with a number that is not positive."""
    if not -length <= tokens <= 0:
        raise ValueError(f"crop got {tokens}, expected 0 to {-length}: minus the number of tokens to remove")
    return length + tokens


class FullLayer(Layer):
    """Every token, in a ``KVState`` that is made larger by doubling."""

    is_sliding = False

    def __init__(self, dtype: torch.dtype | None = None, max_length: int | None = None) -> None:
        super().__init__(dtype, max_length)
        self.state: KVState | PagedKVState | LatentState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.state.nbytes if self.state is not None else 0

    @property
    def _batch(self) -> int:
        return self.state.layout.batch if isinstance(self.state, KVState) else 0

    def _made(self, capacity: int, k: Tensor, v: Tensor) -> KVState | PagedKVState | LatentState:
        b, g, _, d = k.shape
        return KVState(b, g, capacity, d, v.shape[3], dtype=k.dtype, device=k.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for sequences and heads like those of ``key_states`` ``(b, g, m, d)``."""
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside of it
            self.state = self._made(max(self.max_length or FIRST, key_states.shape[2]), key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys ``(b, g, m, d)`` and values ``(b, g, m, e)``; return all of them, which are no copies."""
        before = self.get_seq_length()
        length = before + key_states.shape[2]
        self._check(key_states, value_states, length)
        if self.state is None or (before == 0 and self._batch != key_states.shape[0]):
            self.lazy_initialization(key_states, value_states)
        self._make_room(length)
        self._store(key_states, value_states)
        return self._seen(key_states, value_states, before)

    def _store(self, k: Tensor, v: Tensor) -> None:
        assert isinstance(self.state, KVState | PagedKVState)
        self.state.store(k, v)

    def _make_room(self, length: int) -> None:
        assert isinstance(self.state, KVState | LatentState)
        if length > self.state.capacity:
            with torch.inference_mode(False):
                self.state = self.state.grown(max(length, 2 * self.state.capacity))

    def _seen(self, k: Tensor, v: Tensor, before: int) -> tuple[Tensor, Tensor]:
        """What the newest tokens ``k`` and ``v``, which follow ``before`` others, attend to."""
        self._refresh()
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that ``query_length`` more tokens attend to, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.state.length if self.state is not None else 0

    def get_max_length(self) -> int:
        """Tokens a sequence may reach, -1 for no bound."""
        return self.max_length or -1

    def reset(self) -> None:
        """Forget every token and keep the buffers."""
        self._move(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        self._move(removed(tokens_to_remove, self.get_seq_length()))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` becomes a copy of sequence ``beam_idx[i]``."""
        if isinstance(self.state, KVState | LatentState) and beam_idx.tolist() != list(range(self._batch)):
            self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self._batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, in that order."""
        if self.state is not None:
            self.state = self.state.select(indices)
            self._move(self.state.length)

    def _move(self, length: int) -> None:
        if self.state is not None:
            self.state.crop(length)
            self._refresh()

    def _refresh(self) -> None:
        assert isinstance(self.state, KVState)
        view = self.state.view()
        self.keys, self.values = view.k, view.v


class LatentLayer(FullLayer):
    """Every token's latent with its rotary key behind it in one row, as the kernel of latent attention reads them.

    Models hand them in as keys ``(b, 1, m, c)`` and values ``(b, 1, m, r)``, and get them back as parts of the rows.
    """

    def _made(self, capacity: int, k: Tensor, v: Tensor) -> LatentState:
        if k.shape[1] != 1:
            raise NotImplementedError(
                f"Cache got keys of {k.shape[1]} heads from a model with latents, expected 1: leave cache out to use "
                "Transformers' own"
            )
        self._size = k.shape[3]
        return LatentState(k.shape[0], capacity, k.shape[3], v.shape[3], dtype=k.dtype, device=k.device)

    @property
    def _batch(self) -> int:
        return self.state.buffers["latent"].shape[0] if isinstance(self.state, LatentState) else 0

    def _store(self, k: Tensor, v: Tensor) -> None:
        assert isinstance(self.state, LatentState)
        self.state.append(latent=torch.cat([k, v], -1))

    def _refresh(self) -> None:
        assert isinstance(self.state, LatentState)
        rows = self.state.view()["latent"]
        self.keys, self.values = rows[..., : self._size], rows[..., self._size :]


class IndexedLayer(LatentLayer):
    """Latents, and beside them the keys by which an indexer chooses tokens (DeepSeek-V3.2)."""

    def __init__(self, dtype: torch.dtype | None = None, max_length: int | None = None) -> None:
        super().__init__(dtype, max_length)
        self.index: TokenState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return super().nbytes + (self.index.nbytes if self.index is not None else 0)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store the indexer's keys ``(b, m, size)``; return all of them, which are no copies."""
        b, m, size = indexer_key_states.shape
        if self.index is None or (self.index.length == 0 and self.index.buffers["index"].shape[0] != b):
            with torch.inference_mode(False):
                fields, like = {"index": (1, size)}, indexer_key_states
                self.index = TokenState(b, self.max_length or FIRST, fields, dtype=like.dtype, device=like.device)
        if (length := self.index.length + m) > self.index.capacity:
            with torch.inference_mode(False):
                self.index = self.index.grown(max(length, 2 * self.index.capacity))
        return self.index.append(index=indexer_key_states[:, None])["index"][:, 0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` becomes a copy of sequence ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        if self.index is not None:
            self.index.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, in that order."""
        super().batch_select_indices(indices)
        if self.index is not None:
            self.index = self.index.select(indices)

    def _move(self, length: int) -> None:
        super()._move(length)
        if self.index is not None:
            self.index.crop(min(length, self.index.length))


class HybridLayer(theirs.LinearAttentionLayer, FullLayer):  # type: ignore[override]  # so are theirs of both kinds
    """Full attention beside a linear layer (Falcon-H1), whose state is Transformers' own."""

    def __init__(
        self, number_of_states: int = 1, dtype: torch.dtype | None = None, max_length: int | None = None
    ) -> None:
        FullLayer.__init__(self, dtype, max_length)
        theirs.LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocate for keys and values, or for the states that are named."""
        if args:
            FullLayer.lazy_initialization(self, *args)
        else:
            super().lazy_initialization(**kwargs)

    def get_max_length(self) -> int:
        """Tokens a sequence may reach, -1 for no bound."""
        return FullLayer.get_max_length(self)

    def reset(self) -> None:
        """Forget every token and keep the buffers."""
        super().reset()
        FullLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)
        FullLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` becomes a copy of sequence ``beam_idx[i]``."""
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        FullLayer.reorder_cache(self, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused, because Transformers has no way to do it with the linear layer's state."""
        raise NotImplementedError(
            "sequences of a layer with a linear state cannot be chosen or repeated: repeat the prompts instead"
        )


def _check_guesses(codec: Codec | None) -> None:
    """Refuse ``crop`` after each call for int4, because its guesses would read other numbers than its text."""
    if codec == "int4":
        raise NotImplementedError(
            "int4 keys are rounded in groups of tokens, which a guess would complete too early: leave out "
            "prompt_lookup_num_tokens and assistant_model, or use dtype='int8'"
        )


class CodedLayer(FullLayer):
    """Every token, quantised; what is handed on are codes, which the attention function reads in place."""

    def __init__(self, codec: Codec, max_length: int | None = None) -> None:
        super().__init__(None, max_length)
        self.codec: Codec = codec

    def activate_past_recording(self) -> None:
        """Allow ``crop`` after each call."""
        _check_guesses(self.codec)

    def _made(self, capacity: int, k: Tensor, v: Tensor) -> KVState:
        b, g, _, d = k.shape
        return KVState(b, g, capacity, d, v.shape[3], dtype=k.dtype, device=k.device, codec=self.codec)

    def _seen(self, k: Tensor, v: Tensor, before: int) -> tuple[Tensor, Tensor]:
        assert isinstance(self.state, KVState)
        if self.codec == "int4" and before == 0:
            return k, v  # a prompt is attended to as it came, as KIVI does
        return carried(self.state, k, v)

    def _refresh(self) -> None:
        """No numbers are kept."""


class PagedLayer(FullLayer):
    """Every token, on pages that beams share as long as they say the same; reordering them copies no page.

    A pool has room for ``max_length`` tokens of each sequence of the first batch and is not made larger. With a codec
    what is handed on are codes, as by ``CodedLayer``.
    """

    def __init__(self, dtype: torch.dtype | None, max_length: int, codec: Codec | None = None) -> None:
        super().__init__(dtype, max_length)
        self.codec = codec

    def activate_past_recording(self) -> None:
        """Allow ``crop`` after each call."""
        _check_guesses(self.codec)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in use or not."""
        if not isinstance(self.state, PagedKVState):
            return 0
        recent = self.state.rows[0].get("recent")
        return self.state.pool.nbytes + (recent.nbytes if recent is not None else 0)

    @property
    def _batch(self) -> int:
        return len(self.state.lengths) if isinstance(self.state, PagedKVState) else 0

    def _made(self, capacity: int, k: Tensor, v: Tensor) -> PagedKVState:
        b, g, _, d = k.shape
        pages = b * -(-capacity // PAGE)
        pool = PagePool(pages, PAGE, g, d, v.shape[3], dtype=k.dtype, device=k.device, codec=self.codec)
        return PagedKVState(pool, b)

    def _make_room(self, length: int) -> None:
        """The pool has it, or refuses."""

    def _seen(self, k: Tensor, v: Tensor, before: int) -> tuple[Tensor, Tensor]:
        assert isinstance(self.state, PagedKVState)
        as_it_came = before == 0 and self.codec in (None, "int4")
        return (k, v) if as_it_came else carried(self.state, k, v)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` has the pages of sequence ``beam_idx[i]``; no number moves."""
        if beam_idx.tolist() != list(range(self._batch)):
            self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, in that order."""
        if isinstance(self.state, PagedKVState):
            before, self.state = self.state, self.state.select(indices)
            before.release()

    def _refresh(self) -> None:
        """No numbers are kept."""
