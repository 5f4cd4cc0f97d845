"""Mask functions of Transformers against the masks they are translated to, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils as theirs

from attnkit.hf.masks import CarriedMask, attention_mask
from attnkit.masks import Explicit, Mask

KEPT = torch.ones(2, 20, dtype=torch.bool)
KEPT[0, :6] = False
RESTARTING = torch.cat([torch.arange(9), torch.arange(7), torch.arange(4)])[None].expand(2, -1)
IDS = theirs.find_packed_sequence_indices(RESTARTING)
BLOCKS = torch.tensor([[-1] * 4 + [0] * 5 + [-1] * 3 + [1] * 8, [0] * 3 + [-1] * 17])
CAUSAL = theirs.causal_mask_function


def packed(inner: Any) -> Any:
    moved = theirs.remap_positions_for_packed_sequence(inner, RESTARTING)
    return theirs.and_masks(moved, theirs.packed_sequence_mask_function(IDS))


FUNCTIONS = {
    "causal": CAUSAL,
    "bidirectional": theirs.bidirectional_mask_function,
    "window": theirs.sliding_window_causal_mask_function(5),
    "two-sided window": theirs.sliding_window_bidirectional_mask_function(3),
    "chunks": theirs.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "chunks after padding": theirs.chunked_causal_mask_function(4, torch.tensor([6, 0])),
    "packed": packed(CAUSAL),
    "packed window": packed(theirs.sliding_window_causal_mask_function(3)),
    "packed chunks": packed(theirs.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))),
    "blocks": theirs.or_masks(CAUSAL, theirs.blockwise_overlay(BLOCKS)),
}
# Queries, keys, and where each begin: all at once, one and several more tokens, a window's cache, a static cache.
CALLS = [(20, 20, 0, 0), (1, 20, 19, 0), (3, 20, 17, 0), (3, 7, 17, 13), (2, 20, 9, 0), (9, 20, 0, 0)]
# Transformers packs only calls without a cache.
CASES = [(name, call) for name in FUNCTIONS for call in CALLS if not name.startswith("packed") or call == CALLS[0]]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("name", "call"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:attnkit does not know")
def test_translation_shows_the_same_pairs(name: str, call: tuple[int, int, int, int], padded: bool) -> None:
    m, n, q_offset, kv_offset = call
    arguments = (2, m, n, q_offset, kv_offset, FUNCTIONS[name], KEPT if padded else None)
    ours = attention_mask(*arguments)
    assert isinstance(ours, CarriedMask)
    expected = theirs.sdpa_mask(*arguments, allow_is_causal_skip=False)
    assert torch.equal(ours.dense().expand_as(expected), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_masks_are_never_dense(name: str) -> None:
    ours = attention_mask(2, 20, 20, 0, 0, FUNCTIONS[name], KEPT)
    assert isinstance(ours, CarriedMask)
    parts: list[Mask] = [ours.mask]
    while parts:
        part = parts.pop()
        assert not isinstance(part, Explicit)
        parts += [getattr(part, side) for side in ("one", "other") if hasattr(part, side)]


def test_a_causal_mask_over_a_static_cache_leaves_its_room_out() -> None:
    ours = attention_mask(2, 2, 20, 9, 0, CAUSAL)
    assert isinstance(ours, CarriedMask) and ours.keys == 11


def test_an_unknown_function_is_built_in_full_with_a_warning() -> None:
    def even(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k % 2 == 0) & (k <= q)

    with pytest.warns(UserWarning, match="does not know the mask function"):
        ours = attention_mask(1, 6, 6, 0, 0, even)
    assert torch.equal(ours.dense()[0, 0], (torch.arange(6) % 2 == 0) & torch.ones(6, 6, dtype=torch.bool).tril())


def test_a_mask_is_a_plain_tensor_while_a_graph_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours = attention_mask(2, 4, 4)
    assert type(ours) is torch.Tensor
    assert torch.equal(ours[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())


def test_a_mask_survives_what_models_do_to_it() -> None:
    ours = attention_mask(2, 4, 4)
    for same in (ours[:, :, :, :4], ours[..., :9], ours.to("cpu"), ours.detach(), ours.clone(), ours.bool()):
        assert isinstance(same, CarriedMask)
    assert torch.equal(ours[:, 0], torch.ones(2, 4, 4, dtype=torch.bool).tril())
    assert torch.equal(torch.where(ours, 0.0, -1.0) < 0, ~ours.dense())


@pytest.mark.parametrize(
    "wrong", [lambda x: x + torch.zeros(4, 4), lambda x: x.float(), lambda x: 1 - x, lambda x: torch.cat([x, x], -1)]
)
def test_arithmetic_with_a_mask_is_refused(wrong: Any) -> None:
    with pytest.raises(NotImplementedError, match="with its attention mask"):
        wrong(attention_mask(2, 4, 4))
