"""The lengths of the traffic as a distribution: percentiles, or every length that was seen."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
LONGEST = 1 << 31
MOST_LINES = 20_000_000


@dataclass(frozen=True)
class Lengths:
    """Tokens of a whole request, prompt and answer, by the part of requests that are at most as long.

    ``points`` are ``(part, tokens)`` in rising order; between two, lengths are taken to rise evenly on a logarithmic
    scale, as those of texts do, and before the first to start at one token for part 0.
    """

    points: tuple[tuple[float, int], ...]
    worst: int
    text: str = ""

    def at(self, part: float) -> int:
        """The length that ``part`` of the requests do not exceed."""
        points = [(0.0, 1), *self.points, *([(1.0, self.worst)] if self.points[-1][0] < 1 else [])]
        for (low, short), (high, long) in zip(points, points[1:], strict=False):
            if part <= high:
                share = (part - low) / (high - low) if high > low else 1.0
                return round(math.exp(math.log(max(1, short)) * (1 - share) + math.log(max(1, long)) * share))
        return self.worst

    @property
    def mean(self) -> float:
        """The mean length."""
        steps = 400
        return sum(self.at((i + 0.5) / steps) for i in range(steps)) / steps

    @property
    def columns(self) -> dict[str, int]:
        """The lengths that an answer is about."""
        return {"p50": self.at(0.5), "p95": self.at(0.95), "p99": self.at(0.99), "worst": self.worst}


def tokens(text: str, what: str) -> int:
    """``96k`` as a number: k is 1,024 and M 1,024 x 1,024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmM]?)", text.strip())
    found = round(float(match[1]) * UNITS[match[2].lower()]) if match else 0
    if not 1 <= found <= LONGEST:
        raise ValueError(f"{what} is {text.strip()!r}, expected tokens from 1 to {LONGEST:,}, such as 512, 2k or 1M")
    return found


def parse(text: str, longest: int | None = None) -> Lengths:
    """Lengths from ``p50=2k,p99=96k`` (``max=`` is the worst case), one length such as ``8k``, or a file of lengths.

    ``longest`` is what the model was made for: the worst case where none is said, and an error where one is beyond it.
    """
    path = Path(text)
    if path.is_file():
        found = from_file(path)
    elif "=" in text:
        found = _from_percentiles(text, longest)
    elif re.fullmatch(r"[\d.]+\s*[kKmM]?", text.strip()):
        count = tokens(text, "lengths")
        found = Lengths(((0.0, count), (1.0, count)), count, text)
    else:
        raise ValueError(f"lengths is {text!r}, expected percentiles such as p50=2k,p99=96k, or a file of lengths")
    if longest is not None and found.worst > longest:
        raise ValueError(
            f"lengths go to {found.worst:,} tokens and the model to {longest:,} (max_position_embeddings), expected "
            "lengths that it can take, or a model made for longer ones"
        )
    return found


def from_file(path: Path) -> Lengths:
    """The distribution of the lengths in a file, one a line; empty lines and those that start with # do not count."""
    found = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            word = line.strip().strip(",")
            if word and not word.startswith("#"):
                found.append(tokens(word, f"{path} line {number}"))
            if number > MOST_LINES:
                raise ValueError(f"{path} has more than {MOST_LINES:,} lines, expected a sample of the lengths")
    if not found:
        raise ValueError(f"{path} has no lengths, expected one a line")
    found.sort()
    parts = sorted({0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0})
    points = tuple((part, found[min(len(found) - 1, math.ceil(part * len(found)) - 1)]) for part in parts)
    return Lengths(points, found[-1], str(path))


def _from_percentiles(text: str, longest: int | None) -> Lengths:
    points: dict[float, int] = {}
    worst = None
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        if name.lower() in ("max", "worst", "p100"):
            worst = tokens(value, f"lengths: {name}")
            continue
        match = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)", name.lower())
        if not match:
            raise ValueError(
                f"lengths has {word.strip()!r}, expected percentiles such as p50=2k, and max= for the worst"
            )
        points[float(match[1]) / 100] = tokens(value, f"lengths: {name}")
    ordered = sorted(points.items())
    for (low, short), (high, long) in zip(ordered, ordered[1:], strict=False):
        if long < short:
            pair = f"p{high * 100:g} is {long} and p{low * 100:g} is {short}"
            raise ValueError(f"lengths: {pair}, expected percentiles that do not fall")
    if not ordered:
        raise ValueError(f"lengths is {text!r}, expected at least one percentile such as p50=2k")
    last = ordered[-1][1]
    if worst is not None and worst < last:
        raise ValueError(
            f"lengths: max is {worst} and p{ordered[-1][0] * 100:g} is {last}, expected max to be the most"
        )
    return Lengths(tuple(ordered), worst or max(last, longest or last), text)
