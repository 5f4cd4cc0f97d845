"""The JSON lines of one run, read into records: what a table, a chart or a sentence asks for."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from attnkit.bench.results import upgraded
from attnkit.report.noise import SMALLEST_TIMING

Line = Mapping[str, Any]

FORMAT = 1
TASKS = ("recall", "copy", "needle")


@dataclass(frozen=True, order=True)
class Place:
    """Where a task was measured: a sequence length and, for recall, a number of pairs. Greater is harder."""

    length: int
    pairs: int = 0

    def __str__(self) -> str:
        return f"{self.length} tokens, {self.pairs} pairs" if self.pairs else f"{self.length} tokens"


@dataclass(frozen=True)
class Text:
    """One model trained on the text. ``bits_per_byte`` is None when training diverged."""

    bits_per_byte: float | None
    curve: tuple[tuple[float, float], ...]
    tokens: int
    parameters: int
    tokens_per_second: float
    backend: str


@dataclass(frozen=True)
class Task:
    """One model trained on a task: the accuracy (0 to 1) at each place.

    ``state`` is the bytes of state of a sequence at each place, ``token_bytes`` what one more token adds to them: 0
    where the state does not grow, and None where the run did not say.
    """

    accuracy: Mapping[Place, float]
    backend: str
    state: Mapping[Place, int] = field(default_factory=dict)
    token_bytes: float | None = None


@dataclass(frozen=True)
class Speed:
    """``decode`` is milliseconds a token by tokens of context; ``token_bytes`` is 0 where the cache does not grow."""

    prefill: float
    prefill_backend: str
    decode: Mapping[int, float]
    decode_backend: str
    token_bytes: float
    cache: int
    cache_predicted: int
    context: int
    spread: float
    others: float


@dataclass(frozen=True)
class Picture:
    """A mask as rows of levels: 0 nothing of a cell is visible, 1 some, 2 all."""

    title: str
    n: int
    cells: tuple[tuple[int, ...], ...]

    @property
    def sees_all(self) -> bool:
        """The last query sees every key before it; the cell it stands in may hold keys after it."""
        return bool(self.cells) and all(level == 2 for level in self.cells[-1][:-1])


@dataclass(frozen=True)
class Kernel:
    """One kernel against torch's; ``share`` is of the machine's limit that binds it (arithmetic or memory).

    ``ratio`` and ``share`` are None where ``wrong`` says how the result differs from the definition. ``spread`` is the
    middle half of our times over their median, ``others`` the cores that other programs kept busy meanwhile.
    """

    id: str
    work: str
    ours_ms: float
    sdpa_ms: float
    ratio: float | None
    share: float | None
    floor_ratio: float | None
    floor_share: float | None
    spread: float
    others: float
    wrong: str | None

    @property
    def meets_floors(self) -> bool:
        fast = self.floor_ratio is None or (self.ratio is not None and self.ratio >= self.floor_ratio)
        return (
            self.wrong is None
            and fast
            and (self.floor_share is None or self.share is None or self.share >= self.floor_share)
        )


@dataclass
class Row:
    """One attention layer that was compared, with all that was measured so far, by seed where seeds differ."""

    id: str
    title: str
    label: str
    text: dict[int, Text] = field(default_factory=dict)
    tasks: dict[str, dict[int, Task]] = field(default_factory=dict)
    speed: Speed | None = None
    pictures: list[Picture] = field(default_factory=list)
    layers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of a hybrid, what its layers were, by what was measured: ``text``, ``task`` or ``speed``."""

    @property
    def looks_past(self) -> bool:
        """In every layer that was drawn a query misses some of the keys before it."""
        return bool(self.pictures) and not any(picture.sees_all for picture in self.pictures)

    def state_bytes(self, task: str, place: Place) -> int | None:
        """The bytes of state of one sequence at ``place``, which no seed changes."""
        return next((run.state[place] for run in self.tasks.get(task, {}).values() if place in run.state), None)

    def fixed(self, task: str) -> bool:
        """The state of the models trained on ``task`` does not grow with the sequence, as far as the run says."""
        return any(run.token_bytes == 0 for run in self.tasks.get(task, {}).values())

    def accuracies(self, task: str, place: Place) -> list[float]:
        """The accuracy at ``place``, one value a seed."""
        return [run.accuracy[place] for run in self.tasks.get(task, {}).values() if place in run.accuracy]


@dataclass
class Results:
    """A run: what was asked for, on which machine, and the rows in the order they were asked for."""

    run: Line
    limits: Line | None
    kernels: list[Kernel]
    rows: list[Row]

    @property
    def settings(self) -> Line:
        found: Line = self.run.get("settings") or {}
        return found

    @property
    def machine(self) -> Line:
        found: Line = self.run.get("machine") or {}
        return found

    @property
    def seeds(self) -> list[int]:
        """The seeds asked for, or those found where the run does not say."""
        asked = self.settings.get("seeds")
        return list(asked) if asked else sorted({seed for row in self.rows for seed in row.text})

    @property
    def timing(self) -> float:
        """The part of a time that may be noise: what repeated timings showed, where that is more."""
        return max([SMALLEST_TIMING, *(median(timed.spread for timed in group) for group in self._timed() if group)])

    @property
    def others(self) -> float:
        """Cores that other programs kept busy while rows and kernels were timed."""
        return max((median(timed.others for timed in group) for group in self._timed() if group), default=0.0)

    def _timed(self) -> tuple[Sequence[Kernel | Speed], ...]:
        return self.kernels, [row.speed for row in self.rows if row.speed]

    def places(self, task: str) -> list[Place]:
        """Every place at which ``task`` was measured, the easiest first."""
        return sorted({p for row in self.rows for run in row.tasks.get(task, {}).values() for p in run.accuracy})

    def missing(self) -> dict[str, list[Row]]:
        """What other rows have and these lack: the run is not finished, or was not asked for it."""
        wanted: dict[str, list[Row]] = {"text": [row for row in self.rows if len(row.text) < len(self.seeds)]}
        for task in TASKS:
            if any(task in row.tasks for row in self.rows):
                wanted[task] = [row for row in self.rows if len(row.tasks.get(task, {})) < len(self.seeds)]
        wanted["speed"] = [row for row in self.rows if row.speed is None]
        return {part: rows for part, rows in wanted.items() if rows}


def read(lines: Iterable[Line]) -> Results:
    """Sort ``lines`` into rows; the last line about a thing counts, so those of a resumed run are right.

    Raises ValueError for a line of another format, of an unknown kind, or without a value that it must have.
    """
    run: Line = {}
    limits: Line | None = None
    kernels: dict[str, Kernel] = {}
    rows: dict[str, Row] = {}

    def row_of(line: Line) -> Row:
        name = str(line["row"])
        return rows.setdefault(name, Row(name, name, name))

    for number, line in enumerate(lines, 1):
        kind = line.get("kind") if isinstance(line, Mapping) else None
        try:
            if isinstance(line, Mapping) and "name" in line and row_of(line).title == line["row"]:
                row_of(line).title = str(line["name"])
            if kind == "run":
                _check_format(line)
                run = line
                for name in (line.get("settings") or {}).get("rows") or ():
                    rows.setdefault(str(name), Row(str(name), str(name), str(name)))
            elif kind == "limits":
                limits = line
            elif kind == "kernel":
                kernels[f"{line['id']} {line['work']}"] = _kernel(line)
            elif kind == "mask":
                _add_picture(row_of(line), line)
            elif kind == "text":
                row_of(line).text[int(line["seed"])] = _text(line)
            elif kind == "task":
                row_of(line).tasks.setdefault(str(line["task"]), {})[int(line["seed"])] = _task(line)
            elif kind == "speed":
                row_of(line).speed = _speed(line)
            else:
                raise ValueError(f"its kind is {kind!r}, expected run, limits, kernel, mask, text, task or speed")
            if line.get("layers"):
                row_of(line).layers[str(kind)] = tuple(map(str, line["layers"]))
        except KeyError as error:
            raise ValueError(
                f"line {number} of the results ({kind}) has no {error.args[0]!r}: run compare again"
            ) from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"line {number} of the results cannot be read: {error}") from error
    _name(rows.values())
    return Results(run, limits, list(kernels.values()), list(rows.values()))


def _check_format(line: Line) -> None:
    if line.get("format") != FORMAT:
        raise ValueError(
            f"it has format {line.get('format')!r} of attnkit {line.get('attnkit', 'unknown')}, this version reads "
            f"format {FORMAT}: run compare again or use that version"
        )


def _finite(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None


def _text(line: Line) -> Text:
    points = ((float(tokens), _finite(bits)) for tokens, bits in line["curve"])
    return Text(
        bits_per_byte=_finite(line["bits_per_byte"]),
        curve=tuple((tokens, bits) for tokens, bits in points if bits is not None),
        tokens=int(line["tokens"]),
        parameters=int(line["parameters"]),
        tokens_per_second=float(line["train_tokens_per_second"]),
        backend=str(line["backend"]),
    )


def _task(line: Line) -> Task:
    points = {Place(int(p["length"]), int(p.get("pairs") or 0)): p for p in line["points"]}
    accuracy = {place: _finite(point["accuracy"]) for place, point in points.items()}
    return Task(
        accuracy={place: value for place, value in accuracy.items() if value is not None},
        backend=str(line["backend"]),
        state={place: int(point["state_bytes"]) for place, point in points.items() if "state_bytes" in point},
        token_bytes=_finite(line.get("state_bytes_per_token")),
    )


def _speed(line: Line) -> Speed:
    return Speed(
        prefill=float(line["prefill_tokens_per_second"]),
        prefill_backend=str(line["prefill_backend"]),
        decode={int(p["context"]): float(p["ms"]) for p in line["decode"]},
        decode_backend=str(line["decode_backend"]),
        token_bytes=float(line["cache_bytes_per_token"] or 0),
        cache=int(line["cache_allocated"]),
        cache_predicted=int(line["cache_predicted"]),
        context=int(line["context"]),
        spread=float(line.get("spread") or 0),
        others=float(line.get("others") or 0),
    )


def _kernel(line: Line) -> Kernel:
    line = upgraded(dict(line))
    return Kernel(
        id=str(line["id"]),
        work=str(line["work"]),
        ours_ms=float(line["ours_ms"]),
        sdpa_ms=float(line["peer_ms"]),
        ratio=_finite(line["ratio"]),
        share=_finite(line["share"]),
        floor_ratio=_finite(line.get("floor_ratio")),
        floor_share=_finite(line.get("floor_share")),
        spread=float(line.get("spread") or 0),
        others=float(line.get("others") or 0),
        wrong=line.get("wrong"),
    )


def _add_picture(row: Row, line: Line) -> None:
    levels = {"·": 0, "▪": 1, "■": 2}
    drawn = (text.split() for text in str(line["picture"]).splitlines())
    cells = tuple(tuple(levels[c] for c in cells) for cells in drawn if cells and all(c in levels for c in cells))
    picture = Picture(str(line["title"]), int(line["n"]), cells)
    row.title = picture.title if row.title == row.id else row.title
    row.pictures = [old for old in row.pictures if old.title != picture.title] + [picture]


def _name(rows: Iterable[Row]) -> None:
    """Give each row a short label: ``Multi-head (MHA)`` is MHA, ``Strided (Sparse Transformer)`` is Strided."""
    rows = list(rows)
    short = {row.id: _short(row.title) for row in rows}
    times = Counter(short.values())
    for row in rows:
        row.label = short[row.id] if times[short[row.id]] == 1 else row.title
    again = Counter(row.label for row in rows)
    for row in rows:
        row.label = row.label if again[row.label] == 1 else row.id


def _short(title: str) -> str:
    found = re.fullmatch(r"(.+?) \((.+)\)", title)
    if not found:
        return title
    name, aside = found.groups()
    return aside if aside.isupper() and " " not in aside else name


def joined(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
