"""Wrong programs of top-k attention: what is ranked, when, how many stay, and who wins between equals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.masks import full
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.mechanisms.topk.counts import kept
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _visible(call: dict[str, Any]) -> Tensor:
    keep: Tensor = (call["mask"] or full()).dense(call["q"].shape[2], call["k"].shape[2])
    return keep


def _scores(call: dict[str, Any]) -> Tensor:
    """Scores (b, h, m, n) with -inf where nothing may be seen."""
    q, k = call["q"], call["k"]
    scores: Tensor = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * call["scale"]
    return scores.masked_fill(~_visible(call), -torch.inf)


def _first(scores: Tensor, limit: Tensor) -> Tensor:
    """The ``limit`` best of each row, the earlier of equals first."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(-1) < limit[..., None]


def _limit(call: dict[str, Any]) -> Tensor:
    return kept(_visible(call).sum(-1), call["top"], call["density"])


def _keeping(name: str, mistake: str, best: Callable[[dict[str, Any]], Tensor]) -> None:
    """A program that attends to the keys ``best(call)``, bool (b, h, m, n)."""

    def forward(**call: Any) -> Any:
        q, k, v, scale = (call[name] for name in ("q", "k", "v", "scale"))
        return softmax_attention(q, k, v, mask=best(call) & _visible(call), scale=scale, backend="reference")

    MUTANTS.running(name, mistake, lambda spec: forward)


def _threshold(call: dict[str, Any]) -> Tensor:
    scores = _scores(call)
    least = scores.masked_fill(~_first(scores, _limit(call)), torch.inf)
    return scores >= (least.amin(-1, keepdim=True) if scores.shape[-1] else least)


def _one_list_a_group(call: dict[str, Any]) -> Tensor:
    r = call["q"].shape[1] // call["k"].shape[1]
    return _first(_scores(call), _limit(call))[:, ::r].repeat_interleave(r, 1)


def _share_of_all_keys(call: dict[str, Any]) -> Tensor:
    everything = torch.full_like(_limit(call), call["k"].shape[2])
    return _first(_scores(call), kept(everything, call["top"], call["density"]))


def _rounded_down(call: dict[str, Any]) -> Tensor:
    share = call["density"]
    return _first(
        _scores(call), _limit(call) if share is None else (_visible(call).sum(-1) * share).long().clamp(min=1)
    )


def _not_renormalised(call: dict[str, Any], found: Tensor) -> Tensor:
    scores = _scores(call)
    left = scores.masked_fill(~_first(scores, _limit(call)), -torch.inf)
    share = (left.logsumexp(-1) - scores.logsumexp(-1)).exp().nan_to_num()
    return found * share[..., None].to(found.dtype)


_keeping(
    "mask_after_choice",
    "the best of all keys, hidden ones among them, and then the mask",
    lambda call: _first(_scores({**call, "mask": None}), _limit(call)),
)
_keeping("threshold_keeps_ties", "every key as good as the last kept one stays", _threshold)
_keeping(
    "last_of_equals",
    "of equal scores the later key wins",
    lambda call: _first(_scores(call).flip(-1), _limit(call)).flip(-1),
)
_keeping("one_list_a_group", "the first query head chooses for its whole group", _one_list_a_group)
_keeping("share_of_all_keys", "the density counts hidden keys as well", _share_of_all_keys)
_keeping("rounded_down", "a part of a key is no key", _rounded_down)
MUTANTS.returning("softmax_of_all", "weights of the softmax over all keys, cut and not renormalised", _not_renormalised)
