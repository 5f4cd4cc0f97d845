"""The state of published models, layer by layer in their shapes: what is allocated, what ``cost`` says, what is known.

Everything is built on the meta device, which allocates nothing. A new model is a new row of ``MODELS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from attnkit import registry
from attnkit.masks import window
from attnkit.models.decoder import Decoder, DecoderConfig
from attnkit.positions import Rotary
from attnkit.spec import LayerPlace

SHORT = 8192
"""Tokens. Twice as many must take what ``Published.token`` says more."""


@dataclass(frozen=True)
class Kind:
    """A kind of layer: a preset, ``mechanism/preset``, of so many heads, whose configuration gets the ``settings``."""

    preset: str
    heads: int
    settings: dict[str, Any]

    def make(self, width: int, layers: int) -> Callable[[int], nn.Module]:
        ((spec, preset),) = registry.presets(self.preset)

        def mixer(layer: int) -> nn.Module:
            config = preset.configure(LayerPlace(width, self.heads, layer=layer, layers=layers))
            made: nn.Module = spec.layer(replace(config, **self.settings))
            return made

        return mixer


@dataclass(frozen=True)
class Published:
    """A model of ``width`` with these layers; ``token`` and ``fixed`` are bytes of one sequence over all of them.

    Keys, values and latents are bfloat16, sums float32. ``fixed`` is what is there before the first token.
    """

    model: str
    width: int
    layers: tuple[Kind, ...]
    token: int
    fixed: int


LLAMA = Kind("softmax/gqa", 32, {"kv_heads": 8, "rotary": Rotary(128, base=5e5)})
MISTRAL = Kind("softmax/gqa", 32, {"kv_heads": 8, "rotary": Rotary(128), "mask": window(4096)})
LATENT: dict[str, Any] = {"latent": 512, "query_latent": 1536, "nope_size": 128, "rope_size": 64, "value_size": 128}
LATENT |= {"rotary": Rotary(64, style="interleaved")}
MINIMAX = Kind("softmax/gqa", 64, {"kv_heads": 8, "head_size": 128, "rotary": Rotary(128, base=1e7)})
LIGHTNING = Kind("retention/lightning", 64, {"head_size": 128})
QWEN = Kind("gated/gate_channels", 16, {"kv_heads": 2, "head_size": 256, "rotary": Rotary(256, base=1e7)})
GATED_DELTA = Kind("delta/gated_deltanet", 32, {"key_heads": 16, "key_size": 128, "value_size": 128})


def v4(kind: str, heads: int, rank: int, top: int) -> Kind:
    """A layer of DeepSeek-V4: one vector of 512 channels a token, entries for 4 tokens (CSA) or 128 (HCA)."""
    settings = {"kind": kind, "head_size": 512, "query_rank": rank, "groups": heads // 8, "top": top}
    settings |= {"output_rank": 1024, "window": 128, "rotary": Rotary(64, style="interleaved")}
    index = {"index_heads": 64, "index_size": 128}
    return Kind("compressed/csa", heads, settings | index | {"rate": {"csa": 4, "hca": 128}.get(kind)})


# Bytes of a layer of V4: the ring of the window, and tokens that wait for their entry with a value and a gate each. CSA
# waits with two series for the attention's 512 and the indexer's 128 channels, and keeps one of the window before.
RING = 127 * 512 * 2
CSA_WAITS, HCA_WAITS = 2 * (3 * 2 + 4) * (512 + 128) * 2, 2 * 127 * 512 * 2
CSA_TOKEN, HCA_TOKEN = (512 + 128) // 4 * 2, 512 // 128 * 2
FLASH = {kind: v4(kind, 64, 1024, 512) for kind in ("sliding", "csa", "hca")}
PRO = {kind: v4(kind, 128, 1536, 1024) for kind in ("csa", "hca")}

MODELS = (
    Published("Llama-3-8B", 4096, (LLAMA,) * 32, token=32 * 2 * 8 * 128 * 2, fixed=0),
    Published("Mistral-7B", 4096, (MISTRAL,) * 32, token=0, fixed=32 * 2 * 8 * 128 * 2 * 4096),
    Published("DeepSeek-V3", 7168, (Kind("mla/mla_rope", 128, LATENT),) * 61, token=61 * 576 * 2, fixed=0),
    Published(
        "DeepSeek-V3.2",
        7168,
        (Kind("dsa/dsa_lightning", 128, LATENT | {"index_heads": 64, "index_size": 128, "top": 2048}),) * 61,
        token=61 * (576 + 128) * 2,
        fixed=0,
    ),
    Published(
        "DeepSeek-V4-Flash",
        4096,
        (FLASH["sliding"],) * 2 + (FLASH["csa"], FLASH["hca"]) * 20 + (FLASH["csa"],),
        token=21 * CSA_TOKEN + 20 * HCA_TOKEN,
        fixed=43 * RING + 21 * CSA_WAITS + 20 * HCA_WAITS,
    ),
    Published(  # 9.6 GiB at a million tokens, as was reported
        "DeepSeek-V4-Pro",
        7168,
        (PRO["hca"],) * 2 + (PRO["csa"], PRO["hca"]) * 29 + (PRO["csa"],),
        token=30 * CSA_TOKEN + 31 * HCA_TOKEN,
        fixed=61 * RING + 30 * CSA_WAITS + 31 * HCA_WAITS,
    ),
    Published(
        "MiniMax-01",
        6144,
        ((LIGHTNING,) * 7 + (MINIMAX,)) * 10,
        token=10 * 2 * 8 * 128 * 2,
        fixed=70 * 64 * 128 * 128 * 4,
    ),
    Published(
        "Qwen3-Next-80B-A3B",
        2048,
        ((GATED_DELTA,) * 3 + (QWEN,)) * 12,
        token=12 * 2 * 2 * 256 * 2,
        fixed=36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2),
    ),
)


@pytest.mark.parametrize("known", MODELS, ids=lambda known: known.model)
def test_allocated_predicted_and_published_bytes_are_equal(known: Published) -> None:
    with torch.device("meta"):
        mixers = [kind.make(known.width, len(known.layers)) for kind in known.layers]
        model = Decoder(DecoderConfig(1, known.width, len(mixers), hidden=1), mixers).bfloat16()
    allocated = {tokens: model.state(1, tokens).nbytes for tokens in (SHORT, 2 * SHORT)}
    for tokens, found in allocated.items():
        costs = [block.mixer.cost(1, tokens, dtype=torch.bfloat16) for block in model.layers]
        assert found == sum(cost.state_bytes(tokens) for cost in costs)
    assert allocated[2 * SHORT] - allocated[SHORT] == known.token * SHORT
    assert allocated[SHORT] - known.token * SHORT == known.fixed
