"""Which attention, which cache and which backend a model should have: from its sizes, its hardware and its traffic.

>>> from attnkit.advise import advise
>>> answer = advise("llama-3-8b", hardware="h100-sxm", lengths="p50=2k,p99=6k", concurrency=16)
>>> answer.decision.chosen
'as-is'
"""

from __future__ import annotations

from attnkit.advise.answer import Answer, advise
from attnkit.advise.families import from_config, read_config
from attnkit.advise.hardware import Hardware
from attnkit.advise.lengths import Lengths
from attnkit.advise.model import Layer, Mixer, Model

__all__ = [
    "Answer",
    "Hardware",
    "Layer",
    "Lengths",
    "Mixer",
    "Model",
    "advise",
    "from_config",
    "read_config",
]
