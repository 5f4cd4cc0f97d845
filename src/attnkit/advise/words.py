"""Numbers with their units, and what a user's words about quality ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RECALL = "recall retrieval retrieve needle exact agent agents rag copy copying citation citations lookup code"
_LOCAL = "local locality nearby"
_STREAM = "stream streaming endless unbounded infinite always-on"
_FILLER = """matters matter is important critical the a an of and needs need we it with strong no must for in to long
    very documents document text high quality only training without heavy prompts prompt"""


@dataclass(frozen=True)
class Quality:
    """What has to stay: exact recall of far tokens, or only of near ones; or that there is no end to the text."""

    recall: bool = False
    local: bool = False
    streaming: bool = False
    text: str = ""


def quality(text: str) -> Quality:
    """Understand words such as "recall matters". Raises ``ValueError`` for words that mean nothing here."""
    words = re.findall(r"[\w-]+", text.lower())
    known = {"recall": _RECALL.split(), "local": _LOCAL.split(), "streaming": _STREAM.split()}
    pieces = [piece for word in words for piece in ([word] if _known(word, known) else word.split("-"))]
    strange = [piece for piece in pieces if not _known(piece, known) and piece not in _FILLER.split()]
    if strange:
        raise ValueError(
            f"quality has {strange[0]!r}, expected words such as recall, retrieval, agents; locality; streaming"
        )
    return Quality(**{name: any(piece in of for piece in pieces) for name, of in known.items()}, text=text)


def _known(word: str, known: dict[str, list[str]]) -> bool:
    return any(word in of for of in known.values())


def size(count: float) -> str:
    """``16.0 GiB``: bytes with a binary unit."""
    value, units = float(abs(count)), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    sign = "-" if count < 0 else ""
    if units[0] == "B":
        return f"{sign}{value:.0f} B"
    return f"{sign}{value:.1f} {units[0]}" if value < 100 else f"{sign}{value:.0f} {units[0]}"


def seconds(value: float) -> str:
    """``35 ms``: three digits at most."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1 or unit == "us":
            scaled = value * factor
            return f"{scaled:,.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    raise AssertionError(value)


def count(value: float) -> str:
    """``8.03 G``: a number of weights."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"


def length(tokens: int) -> str:
    """``96k``: tokens, with a binary unit where nothing is lost."""
    for unit, factor in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= factor and tokens % factor == 0:
            return f"{tokens // factor}{unit}"
    return f"{tokens:,}"


def duration(text: str, what: str) -> float:
    """Seconds of ``2s`` or ``50ms``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|min)", text.strip().lower())
    if not match:
        raise ValueError(f"{what} is {text!r}, expected a time such as 50ms or 2s")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "min": 60}[match[2]]


def targets(text: str) -> dict[str, float]:
    """``ttft=2s,itl=50ms`` as seconds by name."""
    found = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, value = word.partition("=")
        if name not in ("ttft", "itl"):
            raise ValueError(f"target has {name!r}, expected ttft (time to first token) or itl (time between tokens)")
        found[name] = duration(value, f"target {name}")
    return found
