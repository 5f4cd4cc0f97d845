"""When two numbers may be called different: the rules that keep the report from claiming what is only noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

# The chance, over all pairs of rows together, that a difference is claimed between rows that have none.
RISK = 0.05

# With one seed nothing shows how far a number moves by chance, so these much are assumed.
ASSUMED_BITS = 0.05
ASSUMED_ACCURACY = 0.10
# A task is scored on finitely many answers, and a difference below this helps nobody.
SMALLEST_BITS = 0.005
SMALLEST_ACCURACY = 0.02
# Times are medians taken once on a machine that does other things too; more where the run itself shows more.
SMALLEST_TIMING = 0.10


@dataclass(frozen=True)
class Sample:
    """One number of one row, once for each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None with one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Noise:
    """How far apart two samples must lie before they are called different.

    ``spread`` is the standard deviation of a value over seeds, pooled over the rows, and ``reach`` how many times its
    standard error two means may differ by chance. ``absolute`` and ``relative`` are margins that hold in any case.
    """

    absolute: float = 0.0
    relative: float = 0.0
    spread: float | None = None
    reach: float = 0.0

    def between(self, a: Sample, b: Sample) -> float:
        """The margin for ``a`` against ``b``, in their unit."""
        margin = max(self.absolute, self.relative * max(abs(a.mean), abs(b.mean)))
        if self.spread is None:
            return margin
        return max(margin, self.reach * self.spread * math.sqrt(1 / len(a.values) + 1 / len(b.values)))

    def separates(self, a: Sample, b: Sample) -> bool:
        """May the two be called different? A difference equal to the margin may not, to a rounding error."""
        return abs(a.mean - b.mean) > self.between(a, b) * (1 + 1e-9)


EXACT = Noise()


def over_seeds(samples: Iterable[Sample], *, smallest: float, assumed: float) -> Noise:
    """The noise of a number that depends on the seed: from the spread where seeds repeat, else ``assumed``.

    All pairs of rows are looked at, so each pair gets an equal part of ``RISK`` (Bonferroni). The spread is itself an
    estimate, so Student's distribution, not the normal one, says how far chance reaches.
    """
    samples = list(samples)
    repeated = [s.values for s in samples if len(s.values) > 1]
    degrees = sum(len(values) - 1 for values in repeated)
    if not degrees:
        return Noise(absolute=assumed)
    squares = sum((value - fmean(values)) ** 2 for values in repeated for value in values)
    pairs = max(1, math.comb(len(samples), 2))
    return Noise(smallest, 0.0, math.sqrt(squares / degrees), student_quantile(RISK / pairs, degrees))


def student_quantile(risk: float, degrees: int) -> float:
    """The t that a Student variable with ``degrees`` exceeds, on either side, with probability ``risk``."""
    low, high = 0.0, 1.0
    while _student_within(high, degrees) < 1 - risk:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, degrees) < 1 - risk else (low, middle)
    return high


def _student_within(t: float, degrees: int) -> float:
    """P(-t < T < t), by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
