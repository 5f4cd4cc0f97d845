"""What to attend to of a long context, without training: one file a policy, one interface, states that obey it.

``policy.state(batch, heads, capacity, ...)`` makes a state whose ``append(k, v, q)`` returns the keys and values that
the new queries attend to. StreamingLLM, H2O, SnapKV, PyramidKV and TOVA let go of tokens; Quest keeps them and reads
some; AShape, VerticalSlash, BlockSparse (MInference) and XAttention choose what a prompt attends to.
"""

from __future__ import annotations

from attnkit.state.policies.base import Evicting, Policy, Seen
from attnkit.state.policies.h2o import H2O
from attnkit.state.policies.kept import KeptState
from attnkit.state.policies.minference import AShape, BlockSparse, PerHead, VerticalSlash
from attnkit.state.policies.prefill import Prefill
from attnkit.state.policies.pyramidkv import PyramidKV
from attnkit.state.policies.quest import Quest
from attnkit.state.policies.snapkv import SnapKV
from attnkit.state.policies.streaming import StreamingLLM
from attnkit.state.policies.tova import TOVA
from attnkit.state.policies.whole import ChosenView, GuidedState, PagewiseState
from attnkit.state.policies.xattention import XAttention

PolicyState = KeptState | GuidedState | PagewiseState
"""What ``policy.state`` makes: ``append`` takes queries as well."""

__all__ = [
    "H2O",
    "TOVA",
    "AShape",
    "BlockSparse",
    "ChosenView",
    "Evicting",
    "GuidedState",
    "KeptState",
    "PagewiseState",
    "PerHead",
    "Policy",
    "PolicyState",
    "Prefill",
    "PyramidKV",
    "Quest",
    "Seen",
    "SnapKV",
    "StreamingLLM",
    "VerticalSlash",
    "XAttention",
]
