"""Lives of a cache's layers: whatever is stored, taken back, reordered and repeated, they hold what theirs does."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attnkit.hf.layers import CodedLayer, FullLayer, IndexedLayer, LatentLayer, PagedLayer
from attnkit.hf.windows import CodedWindowLayer, WindowLayer
from attnkit.state import KVState, PagedKVState

WINDOW = 5


def held(layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer hands on for new tokens, as numbers."""
    got = layer.update(k, v)
    return got[0] + 0, got[1] + 0


class Life(RuleBasedStateMachine):
    """One layer of each kind beside one of theirs."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.length, self.drawn = 2, 0, 0
        self.whole: dict[str, Any] = {
            "full": FullLayer(),
            "bounded": FullLayer(None, 4000),
            "latent": LatentLayer(),
            "indexed": IndexedLayer(),
            "paged": PagedLayer(None, 4000),
            "int8": CodedLayer("int8"),
            "fp8": CodedLayer("fp8", 4000),
            "paged fp8": PagedLayer(None, 4000, "fp8"),
        }
        self.truth, self.index = DynamicLayer(), torch.zeros(2, 0, 3)
        self.window, self.window_truth = WindowLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)
        self.codes = CodedWindowLayer("int8", WINDOW)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    @rule(count=st.sampled_from([1, 1, 2, 7, 31, 64, 300]))
    def update(self, count: int) -> None:
        if self.length + count > 1000:  # the pool is for two sequences of 4000, and there may be four
            return
        k, v, index = (
            self._draw(self.batch, 1, count, 8),
            self._draw(self.batch, 1, count, 6),
            self._draw(self.batch, count, 3),
        )
        want = self.truth.update(k, v)
        self.index = torch.cat([self.index, index], 1)
        self.length += count
        for name, layer in self.whole.items():
            got, codec = held(layer, k, v), getattr(layer, "codec", None)
            for one, other in zip(got, want if codec is None else coded(codec, *want), strict=True):
                assert torch.equal(one, other), name
        assert torch.equal(self.whole["indexed"].update_indexer(index), self.index)
        assert self.window.get_mask_sizes(count) == self.window_truth.get_mask_sizes(count)
        seen, sizes = self.window_truth.update(k, v), self.codes.get_mask_sizes(count)
        for one, other in zip(held(self.window, k, v), seen, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(held(self.codes, k, v), coded("int8", *seen), strict=True):
            assert sizes == (one.shape[2], self.length - one.shape[2])
            assert one.shape[2] <= max(2 * WINDOW + 64, count + WINDOW + 63)
            assert torch.equal(one[:, :, one.shape[2] - other.shape[2] :], other)

    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        count = int(share * min(self.length, 40))
        if not self.length:
            return
        self.truth.crop(-count)
        self.length -= count
        self.index = self.index[:, : self.length]
        for layer in self.whole.values():
            layer.crop(-count)
        self._renew_window()

    def _renew_window(self) -> None:
        """Theirs cannot be cropped past its window: both begin anew with what is left."""
        self.window, self.window_truth = WindowLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)
        self.codes = CodedWindowLayer("int8", WINDOW)
        if self.length:
            self.window.update(self.truth.keys, self.truth.values)
            self.codes.update(self.truth.keys, self.truth.values)
            self.window_truth.update(self.truth.keys, self.truth.values)

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def reorder(self, data: Any) -> None:
        rows = torch.tensor(
            data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        )
        self.index = self.index[rows]
        for layer in self._all():
            layer.reorder_cache(rows)

    @precondition(lambda self: self.length and self.batch < 3)
    @rule()
    def repeat(self) -> None:
        self.batch *= 2
        self.index = self.index.repeat_interleave(2, 0)
        for layer in self._all():
            layer.batch_repeat_interleave(2)

    @precondition(lambda self: self.length and self.batch > 1)
    @rule()
    def select(self) -> None:
        rows = torch.tensor([self.batch - 1, 0][: self.batch // 2 + 1])
        self.batch, self.index = len(rows), self.index[rows]
        for layer in self._all():
            layer.batch_select_indices(rows)

    @rule()
    def reset(self) -> None:
        self.length, self.index = 0, self.index[:, :0]
        for layer in self._all():
            layer.reset()
        self.window_truth = DynamicSlidingWindowLayer(WINDOW)

    def _all(self) -> list[Any]:
        return [*self.whole.values(), self.truth, self.window, self.window_truth, self.codes]

    @invariant()
    def sound(self) -> None:
        for layer in getattr(self, "whole", {}).values():
            assert layer.get_seq_length() == self.length
            assert layer.get_mask_sizes(3) == (self.length + 3, 0)
            if layer.state is not None:
                layer.state.check()
            if isinstance(layer.state, PagedKVState):
                assert layer.state.pool.free == len(layer.state.pool.k) - len(
                    {p for t in layer.state._tables for p in t}
                )


def coded(codec: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = KVState(*k.shape[:3], k.shape[3], v.shape[3], codec=codec)
    state.store(k, v)
    return state.numbers()


def test_lives_of_layers(live: Any) -> None:
    live(Life, 50, 25)
