"""Latent attention (MLA) of Transformers through our mechanism: heads' keys and values are named and not made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.dispatch import decide, run
from attnkit.hf.carried import Carried
from attnkit.masks import Mask
from attnkit.mechanisms.mla import SPEC as MLA


class Latents:
    """Latents ``(b, 1, n, c)`` and rotary keys ``(b, 1, n, r)`` of a layer, for keys and values of its heads."""

    def __init__(self, layer: Any, latent: Tensor, rotary: Tensor) -> None:
        self.layer, self.latent, self.rotary = layer, latent, rotary
        self._dense: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, mask: Mask | None, scale: float | None) -> Tensor | None:
        """Attention of queries ``(b, h, m, d)`` to the latents themselves; None where making the heads costs less."""
        weight = self.layer.kv_b_proj.weight
        kv_b = weight.view(q.shape[1], -1, weight.shape[1])
        call = MLA.call(q, joined(self.latent, self.rotary), kv_b, mask=mask, scale=scale)
        if decide(MLA, call)[0].name not in ("cpu", "absorbed"):
            return None  # the model makes them in its own dtype, which costs less again
        o: Tensor = run(MLA, call)
        return o

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, as the model makes them."""
        if self._dense is None:
            self._dense = type(self.layer).expand_kv(self.layer, self.latent, self.rotary)
        return self._dense


def joined(latent: Tensor, rotary: Tensor) -> Tensor:
    """Both in one row: without a copy where they lie so, as in ``LatentLayer``."""
    b, g, n, c = latent.shape
    beside = (
        latent.untyped_storage().data_ptr() == rotary.untyped_storage().data_ptr()
        and latent.stride() == rotary.stride()
        and latent.stride(3) == 1
        and rotary.storage_offset() == latent.storage_offset() + c
    )
    if beside:
        return latent.as_strided((b, g, n, c + rotary.shape[3]), latent.stride())
    return torch.cat([latent, rotary], -1)


class CarriedHeads(Carried):
    """The keys ``(b, h, n, d)`` or the values ``(b, h, n, e)`` that ``latents`` stand for; ``which`` is 0 or 1."""

    latents: Latents
    which: int

    @staticmethod
    def __new__(cls, latents: Latents, which: int, size: int) -> CarriedHeads:
        layer, latent = latents.layer, latents.latent
        shape = (latent.shape[0], layer.num_heads, latent.shape[2], size)
        made: CarriedHeads = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=latent.dtype, device=latent.device)
        made.latents, made.which = latents, which
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # theirs has no types
        return f"CarriedHeads({'kv'[self.which]}, shape={tuple(self.shape)})"

    def again(self, device: Any) -> CarriedHeads:
        return CarriedHeads(self.latents, self.which, self.shape[3])

    def dense(self) -> Tensor:
        return self.latents.dense()[self.which]


def carried_heads(layer: Any, latent: Tensor, rotary: Tensor) -> tuple[CarriedHeads, CarriedHeads]:
    """What stands for ``layer.expand_kv(latent, rotary)``."""
    latents = Latents(layer, latent, rotary)
    key_size = layer.qk_nope_head_dim + layer.qk_rope_head_dim
    return CarriedHeads(latents, 0, key_size), CarriedHeads(latents, 1, layer.v_head_dim)


def latents_of(key: Tensor, value: Tensor) -> Latents | None:
    """The latents whose keys and values these are, if a model hands on just those."""
    if not (isinstance(key, CarriedHeads) and isinstance(value, CarriedHeads)):
        return None
    same = key.latents is value.latents and (key.which, value.which) == (0, 1)
    return key.latents if same else None
