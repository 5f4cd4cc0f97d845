"""The states that attnkit allocates for a layer, so that what was predicted can be compared with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.advise.model import Mixer, Model
from attnkit.state import CompressedState, KVState, LatentState, RecurrentState, WindowState

Allocated = KVState | WindowState | LatentState | CompressedState | RecurrentState | Tensor


def allocate(
    mixer: Mixer, tokens: int, dtype: torch.dtype, device: str = "meta", *, batch: int = 1
) -> Allocated | None:
    """The state of ``batch`` sequences of ``tokens``; None where the layer keeps nothing of its own.

    On the meta device nothing is really allocated, and sizes are those that would be.
    """
    options: dict[str, Any] = dict(mixer.options)
    on: dict[str, Any] = {"dtype": dtype, "device": device}
    if not mixer.keeps:
        return None
    match mixer.mechanism:
        case "softmax" | "differential":
            keys = mixer.key_size * (2 if mixer.mechanism == "differential" else 1)
            if mixer.window is not None and mixer.window + mixer.sinks < tokens:
                return WindowState(batch, mixer.groups, mixer.window, keys, mixer.value_size, sinks=mixer.sinks, **on)
            codec: Any = mixer.codec
            return KVState(batch, mixer.groups, tokens, keys, mixer.value_size, codec=codec, **on)
        case "mla" | "dsa":
            index = options.get("index", 0) if options.get("index_heads", 0) else 0
            return LatentState(batch, tokens, options["latent"], options["rotary"], index=index, **on)
        case "compressed":
            streams = {"entry": mixer.key_size} if options["rate"] else {}
            if options.get("index"):
                streams["index"] = options["index"][1]
            overlap = bool(options.get("overlap"))
            return CompressedState(
                batch,
                tokens,
                options["window"],
                mixer.key_size,
                rate=options["rate"] or 1,
                streams=streams,
                overlap=overlap,
                **on,
            )
        case "delta" | "gla" | "retention":
            heads = mixer.groups if mixer.mechanism == "gla" else mixer.heads
            fields = {"state": (heads, mixer.key_size, mixer.value_size)}
            tails = {"conv": (1, options["tail"])} if options.get("tail") else None
            return RecurrentState(batch, fields, tails=tails, **on)
        case "convolution":
            return torch.zeros(batch, options["tail"], **on)
    raise NotImplementedError(f"attnkit has no state for {mixer.mechanism} to compare with")


def allocated_bytes(model: Model, tokens: int, device: str = "meta") -> int:
    """Bytes of the states of all layers for one sequence of ``tokens``, as they are allocated."""
    dtype = getattr(torch, model.dtype)
    total = 0
    for mixer, count in model.mixers.items():
        state = allocate(mixer, tokens, dtype, device)
        total += count * (state.nbytes if state is not None else 0)
    return total
