"""What mechanisms cost, as arithmetic on sizes alone: nothing here imports torch.

The record of each of these mechanisms has the function of its name here as ``cost``, and tests hold it to the bytes
that the states allocate. They are apart from the mechanisms' folders so that a question about a model that is never
loaded is answered before torch could be imported.
"""

from __future__ import annotations

from attnkit.costs.compressed import compressed
from attnkit.costs.latent import dsa, latent_forms, mla
from attnkit.costs.pairs import Band, interval_pairs
from attnkit.costs.recurrent import CHUNK, DELTA_BLOCK, TILE, convolution, delta, gla, retention
from attnkit.costs.softmax import GROUP, differential, packed_bytes, softmax

__all__ = [
    "CHUNK",
    "DELTA_BLOCK",
    "GROUP",
    "TILE",
    "Band",
    "compressed",
    "convolution",
    "delta",
    "differential",
    "dsa",
    "gla",
    "interval_pairs",
    "latent_forms",
    "mla",
    "packed_bytes",
    "retention",
    "softmax",
]
