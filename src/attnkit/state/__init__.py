"""Decoding states: tensors and bookkeeping, no attention maths. ``append`` hands attention a ``View`` of what to attend to."""

from __future__ import annotations

from attnkit.state.kv import KVState
from attnkit.state.view import View
from attnkit.state.window import WindowState

__all__ = ["KVState", "View", "WindowState"]
