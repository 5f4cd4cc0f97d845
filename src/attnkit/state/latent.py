"""A state of latents: one joined row a token for all heads, and nothing that has been expanded."""

from __future__ import annotations

import torch

from attnkit.state.tokens import TokenState


class LatentState(TokenState):
    """What latent attention keeps of each token: ``latent`` ``(b, 1, n, c + r)``, and ``index`` for a learned choice.

    A row of ``latent`` is the normalised latent and, behind it, the shared key that rotary has turned, in one piece, so
    that keys are all of the row and values its first part, and a step copies neither.

    Parameters
    ----------
    batch: sequences.
    capacity: tokens a sequence may hold; an append past it is refused, so choose prompt plus new tokens.
    latent, rotary: channels of the latent and of the shared rotary key, which may be 0.
    index: channels of the key by which an indexer chooses tokens; 0 for none.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        latent: int,
        rotary: int = 0,
        *,
        index: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if latent < 1 or rotary < 0 or index < 0:
            raise ValueError(
                f"LatentState got latent size {latent}, rotary size {rotary} and index size {index}, expected at least "
                f"1, 0 and 0"
            )
        fields = {"latent": (1, latent + rotary)} | ({"index": (1, index)} if index else {})
        super().__init__(batch, capacity, fields, dtype=dtype, device=device, owner="LatentState")
