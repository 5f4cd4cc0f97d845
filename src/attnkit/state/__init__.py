"""Decoding states: tensors and bookkeeping, no attention maths. ``append`` returns a ``View`` to attend to."""

from __future__ import annotations

from attnkit.state.kv import KVState
from attnkit.state.view import View
from attnkit.state.window import WindowState

__all__ = ["KVState", "View", "WindowState"]
