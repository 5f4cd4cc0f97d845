"""What a row is judged by: the columns of the table, and the numbers that the sentences compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from attnkit.report import units
from attnkit.report.noise import (
    ASSUMED_ACCURACY,
    ASSUMED_BITS,
    EXACT,
    SMALLEST_ACCURACY,
    SMALLEST_BITS,
    Noise,
    Sample,
    over_seeds,
)
from attnkit.report.results import TASKS, Place, Results, Row

LEARNED = 0.95

Mark = Literal["best", "tied", ""]


@dataclass(frozen=True)
class Measure:
    """One number for each row that has it: ``samples`` by row id; ``place`` is where a task was measured."""

    name: str
    heading: tuple[str, str]
    better: Literal["low", "high"]
    samples: Mapping[str, Sample]
    noise: Noise
    shown: Callable[[float], str]
    spread_shown: Callable[[float], str] | None = None
    place: Place | None = None

    @property
    def margin(self) -> float:
        """The least difference that may be claimed between two rows measured with as many seeds as most."""
        typical = max(self.samples.values(), key=lambda sample: len(sample.values))
        return self.noise.between(typical, typical)

    def ranked(self) -> list[str]:
        """Row ids from the best mean to the worst."""
        return sorted(self.samples, key=lambda row: self.samples[row].mean, reverse=self.better == "high")

    def separates(self, a: str, b: str) -> bool:
        """May rows ``a`` and ``b`` be called different? Not where one has no value."""
        if a not in self.samples or b not in self.samples:
            return False
        return self.noise.separates(self.samples[a], self.samples[b])

    def leaders(self) -> list[str]:
        """The best row, and those that cannot be told from it."""
        ranked = self.ranked()
        return [row for row in ranked if row == ranked[0] or not self.separates(row, ranked[0])]

    def mark(self, row: str) -> Mark:
        """``best`` only alone and beyond the noise; ``tied`` at the top; nothing where all rows are alike."""
        leaders = self.leaders()
        if row not in leaders or len(leaders) == len(self.samples):
            return ""
        return "best" if len(leaders) == 1 else "tied"

    def text(self, row: str) -> str:
        """The mean, with its spread over seeds when there is one to show."""
        sample = self.samples.get(row)
        if sample is None:
            return "–"
        spread = sample.spread
        if spread is None or self.spread_shown is None:
            return self.shown(sample.mean)
        return f"{self.shown(sample.mean)} ± {self.spread_shown(spread)}"


def bits_per_byte(results: Results) -> Measure:
    samples = {
        row.id: Sample(values)
        for row in results.rows
        if (values := tuple(t.bits_per_byte for t in row.text.values() if t.bits_per_byte is not None))
    }
    noise = over_seeds(samples.values(), smallest=SMALLEST_BITS, assumed=ASSUMED_BITS)
    return Measure("bits", ("bits per", "byte"), "low", samples, noise, units.bits, units.bits)


def accuracy(results: Results, task: str, place: Place) -> Measure:
    """The accuracy of every row on ``task`` at one place."""
    samples = {row.id: Sample(tuple(values)) for row in results.rows if (values := row.accuracies(task, place))}
    noise = over_seeds(samples.values(), smallest=SMALLEST_ACCURACY, assumed=ASSUMED_ACCURACY)
    heading = (f"{task} %", f"{place.length}·{place.pairs}" if place.pairs else f"{place.length}")
    return Measure(task, heading, "high", samples, noise, units.points, units.points, place)


def hardest(results: Results, task: str) -> Measure | None:
    """Accuracy where ``task`` tells most: the hardest place that some row has learned, else the one best answered."""
    measured = [accuracy(results, task, place) for place in results.places(task)]
    if not measured:
        return None
    top = [max(sample.mean for sample in measure.samples.values()) for measure in measured]
    learned = [measure for measure, best in zip(measured, top, strict=True) if best >= LEARNED]
    return learned[-1] if learned else measured[top.index(max(top))]


def decode_context(results: Results) -> int | None:
    """The longest context at which every timed row decoded."""
    contexts = [set(row.speed.decode) for row in results.rows if row.speed is not None]
    return max(set.intersection(*contexts), default=None) if contexts else None


def decode_time(results: Results, context: int) -> Measure:
    samples = {
        row.id: Sample((row.speed.decode[context],))
        for row in results.rows
        if row.speed and context in row.speed.decode
    }
    return Measure(
        "decode", ("decode ms", f"at {context}"), "low", samples, Noise(relative=results.timing), units.rounded
    )


def cache_context(results: Results) -> int:
    """The tokens of context at which caches were measured."""
    return max((row.speed.context for row in results.rows if row.speed), default=0)


def cache_size(results: Results) -> Measure:
    """Bytes of all caches of the model at the context that was measured."""
    samples = {row.id: Sample((float(row.speed.cache),)) for row in results.rows if row.speed}
    return Measure("cache", ("cache", f"at {cache_context(results)}"), "low", samples, EXACT, units.size)


def columns(results: Results) -> tuple[list[Measure], list[Measure]]:
    """The measures of the table that have a value: those of quality, those of cost."""
    quality = [bits_per_byte(results), *filter(None, (hardest(results, task) for task in TASKS))]
    context = decode_context(results)
    cost = [
        _rate("prefill", lambda row: [row.speed.prefill] if row.speed else [], results),
        *([decode_time(results, context)] if context is not None else []),
        _rate("train", lambda row: [run.tokens_per_second for run in row.text.values()], results),
        cache_size(results),
    ]
    return [m for m in quality if m.samples], [m for m in cost if m.samples]


def _rate(name: str, values: Callable[[Row], Sequence[float]], results: Results) -> Measure:
    samples = {row.id: Sample(tuple(found)) for row in results.rows if (found := values(row))}
    return Measure(name, (name, "tokens/s"), "high", samples, Noise(relative=results.timing), units.count)


def token_bytes(row: Row) -> str:
    """Bytes that the cache grows by with each token."""
    if row.speed is None:
        return "–"
    return units.size(row.speed.token_bytes) if row.speed.token_bytes else "fixed"


def _each(*joined: str) -> list[str]:
    """Backends of calls that ran one or several, ``chunk+cpu``, each once."""
    return list(dict.fromkeys(name for names in joined for name in names.split("+") if name))


def backends(row: Row) -> str:
    """What ran: ``cpu, train sdpa``; what trained is named only where it is another."""
    ran = _each(row.speed.prefill_backend, row.speed.decode_backend) if row.speed else []
    trained = [name for name in _each(*(run.backend for run in row.text.values())) if name not in ran]
    text = "+".join(ran)
    return ", ".join(filter(None, (text, f"train {'+'.join(trained)}" if trained else ""))) or "–"
