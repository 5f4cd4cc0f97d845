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
    """A kind of layer: a preset, ``mechanism/preset``, whose configuration gets the model's ``settings``."""

    preset: str
    settings: dict[str, Any]

    def make(self, width: int, layers: int) -> Callable[[int], nn.Module]:
        ((spec, preset),) = registry.presets(self.preset)

        def mixer(layer: int) -> nn.Module:
            # Sizes of the place are stand-ins that any preset accepts; the settings say the real ones.
            config = preset.configure(LayerPlace(256, 4, layer=layer, layers=layers))
            made: nn.Module = spec.layer(replace(config, width=width, **self.settings))
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


LLAMA = Kind("softmax/gqa", {"heads": 32, "kv_heads": 8, "rotary": Rotary(128, base=5e5)})
MISTRAL = Kind("softmax/gqa", {"heads": 32, "kv_heads": 8, "rotary": Rotary(128), "mask": window(4096)})

MODELS = (
    Published("Llama-3-8B", 4096, (LLAMA,) * 32, token=32 * 2 * 8 * 128 * 2, fixed=0),
    Published("Mistral-7B", 4096, (MISTRAL,) * 32, token=0, fixed=32 * 2 * 8 * 128 * 2 * 4096),
)


@pytest.mark.parametrize("known", MODELS, ids=lambda known: known.model)
def test_allocated_predicted_and_published_bytes_are_equal(known: Published) -> None:
    for kind in known.layers:
        if kind.preset.partition("/")[0] not in registry.mechanisms():
            pytest.skip(f"{known.model} is made of {kind.preset}, which is not installed")
    with torch.device("meta"):
        mixers = [kind.make(known.width, len(known.layers)) for kind in known.layers]
        model = Decoder(DecoderConfig(1, known.width, len(mixers), hidden=1), mixers).bfloat16()
    allocated = {tokens: model.state(1, tokens).nbytes for tokens in (SHORT, 2 * SHORT)}
    for tokens, found in allocated.items():
        costs = [block.mixer.cost(1, tokens, dtype=torch.bfloat16) for block in model.layers]
        assert found == sum(cost.state_bytes(tokens) for cost in costs)
    assert allocated[2 * SHORT] - allocated[SHORT] == known.token * SHORT
    assert allocated[SHORT] - known.token * SHORT == known.fixed
