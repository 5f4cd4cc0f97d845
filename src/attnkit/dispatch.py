"""The only place that chooses a backend, and the one that says why."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attnkit.spec import Backend, Call, Decision, Mechanism

# Read once: Dynamo would trace a look-up at every call, and a choice that moves under a running program is a bug.
DEFAULT_BACKEND = os.environ.get("ATTNKIT_BACKEND") or None
_LOG_LEVEL = os.environ.get("ATTNKIT_LOG", "").upper()

log = logging.getLogger("attnkit")
if _LOG_LEVEL in ("DEBUG", "INFO", "WARNING", "ERROR"):
    log.setLevel(_LOG_LEVEL)
    log.addHandler(logging.StreamHandler())
elif _LOG_LEVEL:
    warnings.warn(
        f"ATTNKIT_LOG is {_LOG_LEVEL!r} and is ignored, expected debug, info, warning or error: set one of these",
        stacklevel=2,
    )
_LOGGING = _LOG_LEVEL in ("DEBUG", "INFO")
_watching: list[Counter[tuple[str, str]]] = []


def decide(spec: Mechanism, call: Call, backend: str | None = None) -> tuple[Backend, Decision]:
    """The backend that runs ``call``: the named one, or the first without a reason not to.

    Raises ``NotImplementedError`` with every reason when none can; a named backend never falls back to another.
    """
    chosen, rejected = _choose(spec, call, backend or DEFAULT_BACKEND)
    return chosen, Decision(spec.name, chosen.name, rejected)


def _choose(spec: Mechanism, call: Call, name: str | None) -> tuple[Backend, dict[str, tuple[str, ...]]]:
    rejected: dict[str, tuple[str, ...]] = {}
    for candidate in spec.backends if name is None else (spec.backend(name),):
        reasons = candidate.rejects(call)
        if not reasons and name is None:
            reasons = candidate.declines(call)
        if not reasons:
            return candidate, rejected
        rejected[candidate.name] = reasons
    raise NotImplementedError(str(Decision(spec.name, None, rejected)))


def run(spec: Mechanism, call: Call, backend: str | None = None) -> Any:
    """Run ``call`` on the backend that ``decide`` picks."""
    chosen, rejected = _choose(spec, call, backend or DEFAULT_BACKEND)
    if _LOGGING:
        log.info("%s", Decision(spec.name, chosen.name, rejected))
    for counts in _watching:
        counts[spec.name, chosen.name] += 1
    return chosen.load()(**call)


@contextmanager
def watch() -> Iterator[Counter[tuple[str, str]]]:
    """Count which backend runs each call made inside the block, by mechanism and backend name.

    ``with attnkit.dispatch.watch() as ran: model(x)`` says what a whole model really took.
    """
    counts: Counter[tuple[str, str]] = Counter()
    _watching.append(counts)
    try:
        yield counts
    finally:
        # By identity: two counters that counted the same calls are equal.
        _watching[:] = [other for other in _watching if other is not counts]


def explain(function: Callable[..., Any], *args: Any, backend: str | None = None, **kwargs: Any) -> Decision:
    """Say which backend a call of a mechanism's function would take, and why each earlier one would not.

    Nothing is computed. ``print(attnkit.explain(attnkit.softmax_attention, q, k, v, mask=attnkit.causal()))``.
    """
    spec: Mechanism | None = getattr(sys.modules.get(getattr(function, "__module__", "")), "SPEC", None)
    if spec is None or spec.function is not function:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(f"explain got {name}, expected the function of a mechanism such as attnkit.softmax_attention")
    call = spec.call(*args, **kwargs)
    try:
        return decide(spec, call, backend)[1]
    except NotImplementedError:
        name = backend or DEFAULT_BACKEND
        return Decision(spec.name, None, {name: spec.backend(name).rejects(call)} if name else {})
