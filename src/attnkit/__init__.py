"""attnkit: the attention toolkit for people who build and run language models."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnkit.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names, and torch with them, at the first use of one: help and advice need no torch."""
    if find_spec(f"attnkit.{name}") is not None:
        return import_module(f"attnkit.{name}")
    if name == "__all__" or not name.startswith("_"):
        public = import_module("attnkit.public")
        for found in public.__all__:
            globals().setdefault(found, getattr(public, found))
        globals()["__all__"] = public.__all__
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'attnkit' has no attribute {name!r}")
