"""Decoding states: tensors and bookkeeping, no attention maths. ``append`` returns what there is to attend to."""

from __future__ import annotations

from attnkit.state.compressed import Closed, CompressedState
from attnkit.state.kv import KVState
from attnkit.state.latent import LatentState
from attnkit.state.layered import LayeredState, State
from attnkit.state.paged import PagedKVState, PagePool
from attnkit.state.pooled import PooledState
from attnkit.state.prefix import PoolBusyError, PrefixCache
from attnkit.state.pyramid import PyramidState
from attnkit.state.recurrent import RecurrentState
from attnkit.state.rewritten import RewrittenState
from attnkit.state.summaries import SummaryState
from attnkit.state.tokens import TokenState
from attnkit.state.view import View
from attnkit.state.window import WindowState

__all__ = [
    "Closed",
    "CompressedState",
    "KVState",
    "LatentState",
    "LayeredState",
    "PagePool",
    "PagedKVState",
    "PoolBusyError",
    "PooledState",
    "PrefixCache",
    "PyramidState",
    "RecurrentState",
    "RewrittenState",
    "State",
    "SummaryState",
    "TokenState",
    "View",
    "WindowState",
]
