"""``attnkit compare``: train and time models that differ only in their attention, on real text and on this machine."""

from __future__ import annotations

from attnkit.compare.options import CompareOptions
from attnkit.compare.runner import run

__all__ = ["CompareOptions", "run"]
