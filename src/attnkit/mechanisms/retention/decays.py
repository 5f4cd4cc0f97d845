"""The decays that were published, as natural logarithms, one a head."""

from __future__ import annotations

import math


def retnet_decays(heads: int) -> tuple[float, ...]:
    """RetNet's: ``ln(1 - 2^(-5 - h))`` for head ``h`` from 0 on, the same in every layer."""
    return tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(heads))


def minimax_decays(heads: int, layer: int, layers: int) -> tuple[float, ...]:
    """MiniMax-01's: ALiBi's slopes ``2^(-8 (h + 1) / heads)``, which shrink from layer to layer to almost nothing.

    ``layer`` counts all layers of the model from 0, those with softmax attention too.
    """
    if not 0 <= layer < layers:
        raise ValueError(f"minimax_decays: layer is {layer} of {layers}, expected one from 0 to {layers - 1}")
    share = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return tuple(-(2.0 ** (-8 * (h + 1) / heads)) * share for h in range(heads))
