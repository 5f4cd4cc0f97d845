"""Wrong programs of latent attention: the size of an absorbed key, orders of rows and channels, where a step starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.mla import MLAttention
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _scale_of_the_joined_row(call: dict[str, Any]) -> dict[str, Any]:
    return {"scale": call["scale"] * (call["q"].shape[3] / call["latent"].shape[3]) ** 0.5}


def _values_first(call: dict[str, Any]) -> dict[str, Any]:
    return {"kv_b": call["kv_b"].flip(1)}


def _no_rotary_key(call: dict[str, Any]) -> dict[str, Any]:
    latent, c = call["latent"], call["kv_b"].shape[2]
    return {"latent": torch.cat([latent[..., :c], torch.zeros_like(latent[..., c:])], -1)}


def _turns(call: dict[str, Any]) -> dict[str, Any]:
    latent = call["latent"]
    return {"latent": latent[:, torch.arange(call["q"].shape[1]) % latent.shape[1]]}


def _other_channels(call: dict[str, Any]) -> dict[str, Any]:
    """Both keep the same channels together, and no longer face each other."""
    q, rotary = call["q"], call["latent"].shape[3] - call["kv_b"].shape[2]
    return {"q": torch.cat([q[..., q.shape[3] - rotary :], q[..., : q.shape[3] - rotary]], -1)}


def _from_zero(right: Any) -> Any:
    def turned(layer: MLAttention, x: Tensor, first: int, start: int) -> Tensor:
        found: Tensor = right(layer, x, first, 0)
        return found

    return turned


MUTANTS.calling("scale_of_the_joined_row", "the scale is that of c + r channels", _scale_of_the_joined_row)
MUTANTS.calling("values_first", "the map to values is read as that to keys", _values_first)
MUTANTS.calling("no_rotary_key", "the shared rotary keys are left out", _no_rotary_key)
MUTANTS.calling("latents_in_turn", "heads take turns at the latents", _turns)
MUTANTS.calling("rotary_first", "the rotary part of a query is taken to be its first channels", _other_channels)
MUTANTS.replacing(
    "positions_restart", "each step counts positions from zero", MLAttention, "_turned", _from_zero, preset="mla_rope"
)
