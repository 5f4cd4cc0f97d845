"""``attnkit parity``: has a model's output changed under another attention implementation or cache, and where?"""

from __future__ import annotations

from attnkit.parity.record import Check, Finding, Lane, Row, Verdict
from attnkit.parity.runner import CHECKS, plan, run
from attnkit.parity.subject import Subject
from attnkit.parity.tiny import tiny

__all__ = ["CHECKS", "Check", "Finding", "Lane", "Row", "Subject", "Verdict", "plan", "run", "tiny"]
