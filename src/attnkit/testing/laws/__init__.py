"""What every mechanism promises, as programs that try to break the promise.

``check(spec, backend)`` runs all that apply. Each can be run alone, ``laws.LAWS["causality"](spec, "cpu", seed=3)``:
it returns False when the backend refuses the calls it tries and raises ``AssertionError`` when a promise is broken.
"""

from __future__ import annotations

from attnkit.spec import Mechanism
from attnkit.testing.laws import decoding, limits, results, symmetry, visibility
from attnkit.testing.laws.base import LAWS, Law

__all__ = ["LAWS", "Law", "check", "decoding", "limits", "results", "symmetry", "visibility"]


def check(spec: Mechanism, backend: str, examples: int | None = None) -> dict[str, int]:
    """Run every law that applies; return how often each was really put to the test."""
    return {
        law.name: sum(law(spec, backend, seed) for seed in range(examples or law.examples))
        for law in LAWS.values()
        if law.applies(spec, backend)
    }
