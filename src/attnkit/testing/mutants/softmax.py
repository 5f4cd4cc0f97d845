"""Wrong programs of softmax attention: masks, scale, sinks, soft-cap, bias, heads, log-sum-exp, caches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import attnkit
from attnkit.masks import UNBOUNDED, And, Mask, Not, Or
from attnkit.masks.held import BlockSparse, Documents, Padding
from attnkit.masks.patterns import Chunked, Dilated, Fixed, GlobalTokens, Interval, Prefix, Strided
from attnkit.mechanisms.softmax import SoftmaxAttention, streaming
from attnkit.positions import Rotary
from attnkit.state import KVState, WindowState
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _masking(name: str, mistake: str, spoil: Callable[[Mask, int, int], Mask]) -> None:
    """A mutant that gets one kind of mask wrong, wherever it stands in a combination."""

    def rewritten(mask: Mask | None, m: int, n: int) -> Mask | None:
        match mask:
            case And() | Or():
                return type(mask)(rewritten(mask.one, m, n), rewritten(mask.other, m, n))  # type: ignore[arg-type]
            case Not():
                return Not(rewritten(mask.inner, m, n))  # type: ignore[arg-type]
            case None:
                return None
        return spoil(mask, m, n)

    MUTANTS.calling(
        name, mistake, lambda call: {"mask": rewritten(call["mask"], call["q"].shape[2], call["k"].shape[2])}
    )


class _Seen(Mask):
    """Another mask asked about shifted positions, clamped to those it knows."""

    def __init__(self, inner: Mask, queries: int = 0, keys: int = 0) -> None:
        self.inner, self.queries, self.keys = inner, queries, keys
        self.batches, self.heads, self.length = inner.batches, inner.heads, inner.length

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        most = (self.length or 1 << 40) - 1
        return self.inner.visible(b, h, (q + self.queries).clamp(max=most), (k + self.keys).clamp(max=most))


def _is_window(mask: Mask) -> bool:
    return isinstance(mask, Interval) and mask.left != UNBOUNDED and mask.right == 0


def _interval(mask: Mask, left: int = 0, right: int = 0) -> Mask:
    assert isinstance(mask, Interval)
    return Interval(mask.left + left * (mask.left != UNBOUNDED), mask.right + right * (mask.right != UNBOUNDED))


_masking("window_plus_1", "a window sees one key too many", lambda x, m, n: _interval(x, 1) if _is_window(x) else x)
_masking("window_minus_1", "a window counts the query twice", lambda x, m, n: _interval(x, -1) if _is_window(x) else x)
_masking(
    "causal_sees_next",
    "a query sees the key after it",
    lambda x, m, n: _interval(x, 0, 1) if isinstance(x, Interval) and x.right == 0 else x,
)
_masking(
    "causal_misses_itself",
    "a query does not see its own key",
    lambda x, m, n: _interval(x, 0, -1) if isinstance(x, Interval) and x.right == 0 else x,
)
_masking(
    "top_left",
    "queries stand at the first positions and not at the last",
    lambda x, m, n: _Seen(x, m - n) if isinstance(x, Interval) and m < n else x,
)
_masking(
    "prefix_plus_1",
    "one token too many in a prefix",
    lambda x, m, n: Prefix(x.prompt + 1) if isinstance(x, Prefix) else x,
)
_masking(
    "dilated_phase",
    "holes of a dilated window off by one",
    lambda x, m, n: _Seen(x, 1) if isinstance(x, Dilated) else x,
)
_masking(
    "strided_phase",
    "columns of a strided mask off by one",
    lambda x, m, n: _Seen(x, 1) if isinstance(x, Strided) else x,
)
_masking(
    "fixed_columns",
    "one summary column too few",
    lambda x, m, n: Fixed(x.stride, max(1, x.columns - 1)) if isinstance(x, Fixed) else x,
)
_masking(
    "chunk_edge", "chunks start one position early", lambda x, m, n: _Seen(x, 0, 1) if isinstance(x, Chunked) else x
)
_masking(
    "block_edge", "blocks start one key early", lambda x, m, n: _Seen(x, 0, 1) if isinstance(x, BlockSparse) else x
)
_masking(
    "global_one_way",
    "global tokens are seen by all but do not see all",
    lambda x, m, n: x & Interval(UNBOUNDED, 0) if isinstance(x, GlobalTokens) else x,
)
_masking(
    "documents_leak",
    "packed documents see the ones before them",
    lambda x, m, n: Interval(UNBOUNDED, UNBOUNDED) if isinstance(x, Documents) else x,
)
_masking("padding_inverted", "True hides", lambda x, m, n: ~x if isinstance(x, Padding) else x)


def _dropped(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda call: {name: None}


def _tiled_heads(call: dict[str, Any]) -> dict[str, Any]:
    repeats = call["q"].shape[1] // call["k"].shape[1]
    return {name: call[name].repeat(1, repeats, 1, 1) for name in ("k", "v")}


def _values_from_keys(call: dict[str, Any]) -> dict[str, Any]:
    wanted = call["v"].shape[-1]
    k = call["k"]
    # The true values keep a gradient of zero, or the mutant would crash instead of being wrong.
    return {"v": torch.cat([k] * math.ceil(wanted / k.shape[-1]), -1)[..., :wanted] + 0 * call["v"]}


def _hidden(call: dict[str, Any], key: int) -> dict[str, Any]:
    n = call["k"].shape[2]
    if n < 2:
        return {}
    where = Not(Interval(UNBOUNDED, UNBOUNDED)) if n == 0 else _OneKey(key % n)
    return {"mask": where if call["mask"] is None else call["mask"] & where}


class _OneKey(Mask):
    """All keys but one."""

    def __init__(self, key: int) -> None:
        self.key = key

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k != self.key) & (q == q)


def _capped_before_scale(call: dict[str, Any]) -> dict[str, Any]:
    return {"softcap": call["softcap"] and call["softcap"] * call["scale"]}


MUTANTS.calling("scale_1_percent", "scale 1 % too large", lambda call: {"scale": call["scale"] * 1.01})
MUTANTS.calling(
    "scale_of_value_size", "scale from the value size", lambda call: {"scale": max(1, call["v"].shape[-1]) ** -0.5}
)
MUTANTS.calling("cap_before_scale", "soft-cap on the wrong side of the scale", _capped_before_scale)
MUTANTS.calling("softcap_dropped", "soft-cap accepted and ignored", _dropped("softcap"))
MUTANTS.calling("sink_dropped", "sink accepted and ignored", _dropped("sink"))
MUTANTS.calling("bias_dropped", "bias accepted and ignored", _dropped("bias"))
MUTANTS.calling("alibi_dropped", "ALiBi accepted and ignored", _dropped("alibi"))
MUTANTS.calling("mask_dropped", "mask lost on one road", _dropped("mask"))
MUTANTS.calling(
    "alibi_sign", "far keys gain", lambda call: {"alibi": call["alibi"] if call["alibi"] is None else -call["alibi"]}
)
MUTANTS.calling(
    "alibi_halved",
    "slopes halved",
    lambda call: {"alibi": call["alibi"] if call["alibi"] is None else call["alibi"] / 2},
)
MUTANTS.calling("tiled_heads", "query head h reads KV head h % g", _tiled_heads)
MUTANTS.calling("values_from_keys", "the key cache is read for values", _values_from_keys)
MUTANTS.calling("first_key_lost", "the oldest key is skipped", lambda call: _hidden(call, 0))
MUTANTS.calling("last_key_lost", "the ragged end is skipped", lambda call: _hidden(call, -1))
MUTANTS.calling("dropout_ignored", "dropout accepted and ignored", lambda call: {"dropout": 0.0})
MUTANTS.calling("seed_ignored", "every call drops the same weights", lambda call: {"seed": call["seed"] and 1})


def _split(found: Any) -> tuple[Tensor, Tensor | None]:
    return found if isinstance(found, tuple) else (found, None)


def _joined(o: Tensor, lse: Tensor | None) -> Any:
    return o if lse is None else (o, lse)


def _lse_base_2(call: dict[str, Any], found: Any) -> Any:
    o, lse = _split(found)
    return _joined(o, None if lse is None else lse / math.log(2))


def _sink_forgotten_in_lse(call: dict[str, Any], found: Any) -> Any:
    o, lse = _split(found)
    if lse is None or call["sink"] is None:
        return found
    return o, lse + torch.log1p(-torch.exp(call["sink"][:, None] - lse).clamp(max=1 - 1e-6))


def _sink_counted(call: dict[str, Any], found: Any) -> Any:
    """The sink's share goes to the last value instead of nowhere."""
    o, lse = _split(found)
    if call["sink"] is None or not call["k"].shape[2]:
        return found
    repeats = call["q"].shape[1] // call["k"].shape[1]
    return _joined(o + 0.1 * call["v"][:, :, -1:].repeat_interleave(repeats, 1), lse)


def _mean_of_values(call: dict[str, Any], found: Any) -> Any:
    """An empty row gives the mean of all values, as adding finfo.min does."""
    o, lse = _split(found)
    mean = call["v"].mean(2, keepdim=True).repeat_interleave(call["q"].shape[1] // call["k"].shape[1], 1)
    return _joined(torch.where((o == 0).all(-1, keepdim=True), mean, o), lse)


def _last_batch_row(call: dict[str, Any], found: Any) -> Any:
    o, lse = _split(found)
    return _joined(torch.cat([o[:-1], o[:1]]) if o.shape[0] > 1 else o, lse)


MUTANTS.returning("lse_base_2", "log-sum-exp in base 2", _lse_base_2)
MUTANTS.returning("lse_without_sink", "log-sum-exp without the sink", _sink_forgotten_in_lse)
MUTANTS.returning("sink_counted", "the sink's value reaches the output", _sink_counted)
MUTANTS.returning("mean_of_values", "an empty row gives the mean of the values", _mean_of_values)
MUTANTS.returning("batch_offset", "the last sequence is read from the first", _last_batch_row)


def _without_weights(right: Any) -> Any:
    return lambda o1, lse1, o2, lse2: ((o1 + o2) / 2, torch.logaddexp(lse1, lse2))


def _ring_off_by_one(right: Any) -> Any:
    def write(self: WindowState, k: Tensor, v: Tensor, positions: Tensor) -> None:
        right(self, k, v, positions + (positions >= self.sinks + self.window).to(positions.dtype))

    return write


def _next_position(right: Any) -> Any:
    def rotate(self: Rotary, x: Tensor, positions: Tensor) -> Tensor:
        late = positions + 1 if positions.numel() == 1 else positions
        turned: Tensor = right(self, x, late)
        return turned

    return rotate


def _other_style_in_steps(right: Any) -> Any:
    other = {"half": "interleaved", "interleaved": "half"}

    def rotate(self: Rotary, x: Tensor, positions: Tensor) -> Tensor:
        style = other[self.style] if positions.numel() == 1 else self.style
        turned: Tensor = right(dataclasses.replace(self, style=style), x, positions)  # type: ignore[arg-type]
        return turned

    return rotate


def _always_training(right: Any) -> Any:
    def attend(self: SoftmaxAttention, *args: Any, **kwargs: Any) -> Tensor:
        with mock.patch.object(self, "training", True):
            y: Tensor = right(self, *args, **kwargs)
        return y

    return attend


def _crop_keeps_one(right: Any) -> Any:
    def crop(self: KVState, length: int) -> None:
        right(self, min(length + 1, self.length))

    return crop


def _shared_fork(right: Any) -> Any:
    def fork(self: Any) -> Any:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    return fork


def _slots_of_the_ring(right: Any) -> Any:
    def by_slot(rotary: Rotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
        return right(rotary, q, k, torch.arange(len(positions)))

    return by_slot


def _query_after_the_cache(right: Any) -> Any:
    def by_slot(rotary: Rotary, q: Tensor, k: Tensor, positions: Tensor) -> Any:
        return rotary.rotate(q, torch.tensor([len(positions)])), right(rotary, q, k, positions)[1]

    return by_slot


def _first_tokens_in_text(right: Any) -> Any:
    def by_distance(rotary: Rotary, q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, reach: Any) -> Any:
        return right(rotary, q, k, queries, keys, reach._replace(window=UNBOUNDED))

    return by_distance


MUTANTS.replacing("merge_without_weights", "parts averaged whatever their weight", attnkit, "merge", _without_weights)
MUTANTS.replacing("ring_off_by_one", "a wrapped ring writes one slot late", WindowState, "_write", _ring_off_by_one)
MUTANTS.replacing("step_position_plus_1", "a step rotates by the next position", Rotary, "rotate", _next_position)
MUTANTS.replacing("rotary_layout", "steps pair channels in the other style", Rotary, "rotate", _other_style_in_steps)
MUTANTS.replacing("dropout_in_eval", "dropout stays on in evaluation", SoftmaxAttention, "_attend", _always_training)
MUTANTS.replacing("crop_keeps_one", "a rejected token stays in the cache", KVState, "crop", _crop_keeps_one)
MUTANTS.replacing("shared_fork", "a fork writes into its origin's memory", KVState, "fork", _shared_fork)
for _name, _mistake, _attribute, _wrong in (
    ("slots_of_the_ring", "slots in the order of the ring", "by_slot", _slots_of_the_ring),
    ("query_after_the_cache", "the query stands past its cache", "by_slot", _query_after_the_cache),
    ("first_tokens_in_text", "a prompt's first tokens drift away", "by_distance", _first_tokens_in_text),
):
    MUTANTS.replacing(_name, _mistake, streaming, _attribute, _wrong, preset="streaming")
