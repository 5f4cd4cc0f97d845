"""What the numbers say, in sentences that are derived from them.

Each function looks at one question and returns a paragraph, or None where nothing was measured to answer it. A
difference is stated only where ``Measure.separates`` allows it; a cause only where the data show it: a mask that hides
keys, a cache that does not grow, an accuracy that is lost at the longer length only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attnkit.bench import QUIET
from attnkit.report import memory, units
from attnkit.report.measures import (
    LEARNED,
    Measure,
    accuracy,
    bits_per_byte,
    cache_context,
    cache_size,
    decode_time,
    hardest,
)
from attnkit.report.results import TASKS, Line, Place, Results, Row, joined, read

_TASK_NAMES = {"recall": "recall", "copy": "copying", "needle": "needle retrieval"}
_MEASURED = {"text": "the text", "task": "the tasks", "speed": "timing"}
_PARTS = _TASK_NAMES | {"text": "training on the text", "speed": "timing"}


def paragraphs(lines: Iterable[Line]) -> list[str]:
    """What a run says about this text and this machine, the conclusion first; nothing that may be noise.

    Parameters
    ----------
    lines : the JSON lines of a run, as dicts; of an unfinished run too.
    """
    results = read(lines)
    explained: set[str] = set()
    found = (
        _unfinished(results),
        _conclusion(results),
        _on_text(results),
        _on_cache(results),
        *(_on_task(results, task, explained) for task in TASKS),
        memory.paragraph(results),
        _on_decoding(results),
        _on_kernels(results),
        _on_scope(results),
    )
    return [text for text in found if text]


def _unfinished(results: Results) -> str | None:
    lacking = [
        f"{_PARTS[part]} ({'every row' if len(rows) == len(results.rows) else _labels(rows)})"
        for part, rows in results.missing().items()
    ]
    return f"This run is not finished; missing in part or whole: {joined(lacking)}." if lacking else None


def _conclusion(results: Results) -> str | None:
    """The row to take: with the best, within the noise, in all that measures quality, at the smallest cache."""
    quality = [m for m in (bits_per_byte(results), *_learned_tasks(results)) if m.samples]
    cache = cache_size(results)
    rows = [row for row in results.rows if all(row.id in m.samples for m in (*quality, cache))]
    if not quality or len(rows) < 2:
        return None
    judged = joined([_plain(m) for m in quality])
    good = [row for row in rows if all(row.id in m.leaders() for m in quality)]
    if not good:
        best = joined([f"{_label(results, m.ranked()[0])} leads in {_plain(m)}" for m in quality])
        return f"In short: no row is with the best in {judged} at once. {best}; which counts is for you to say."

    held = {row.id: cache.samples[row.id].mean for row in rows}
    least, largest = min(held[row.id] for row in good), max(held.values())
    size = f"{units.size(least)} at {cache_context(results)} tokens"
    less = f", {units.rounded(largest / least, 2)} times less than the largest" if largest > 1.05 * least else ""
    if len(good) == 1:
        return f"In short: only {good[0].label} is with the best in {judged}. Its cache holds {size}{less}."
    which = "no row" if len(good) == len(rows) else f"none of {_labels(good)}"
    chosen = [row for row in good if held[row.id] == least]
    if len(chosen) == len(good):
        cost = f"and their caches are equally large ({size})."
    else:
        cost = f"so cost decides. The smallest cache among them is that of {_labels(chosen)}: {size}{less}."
    return f"In short: {which} can be distinguished from the best in {judged}, {cost}"


def _on_text(results: Results) -> str | None:
    measure = bits_per_byte(results)
    ranked = measure.ranked()
    if len(ranked) < 2:
        return None
    leaders, best = measure.leaders(), ranked[0]
    low, high = measure.samples[best].mean, measure.samples[ranked[-1]].mean
    spread = measure.noise.spread
    if spread is None:
        noise = (
            "One seed cannot show how far chance moves bits per byte, so "
            f"{units.rounded(measure.margin)} is assumed and rows closer than that are not told apart."
        )
    else:
        seeds = max(len(sample.values) for sample in measure.samples.values())
        noise = (
            f"Over {seeds} seeds the bits per byte of a row vary by {units.bits(spread)} (standard deviation, pooled "
            f"over the rows), so rows closer than {units.bits(measure.margin)} are not told apart."
        )
    if len(leaders) == len(ranked):
        ends = [f"{units.bits(mean)} ({_label(results, row)})" for row, mean in ((best, low), (ranked[-1], high))]
        where = f"between {joined(ends)}" if high > low else f"at {units.bits(low)}"
        return f"On this text no difference in bits per byte can be claimed: all rows lie {where}. {noise}"
    behind = [
        f"{_label(results, row)} (+{measure.samples[row].mean - low:.3f})" for row in ranked if row not in leaders
    ]
    level = f"; indistinguishable from it: {_labels_of(results, leaders[1:])}" if leaders[1:] else ""
    return (
        f"On this text {_label(results, best)} has the lowest bits per byte, {units.bits(low)}{level}. "
        f"Worse by more than the noise: {joined(behind)}. {noise}"
    )


def _on_cache(results: Results) -> str | None:
    timed = [(row, row.speed) for row in results.rows if row.speed is not None]
    if len(timed) < 2:
        return None
    bits, cache = bits_per_byte(results), cache_size(results)
    fixed = [row for row, speed in timed if not speed.token_bytes]
    growing = sorted({speed.token_bytes for _, speed in timed if speed.token_bytes})
    said = []
    if growing:
        span = units.size(growing[0]) if len(growing) == 1 else f"{units.size(growing[0])} to {units.size(growing[-1])}"
        others = " of the other rows" if fixed else ""
        said.append(f"Each token adds {span} to the caches{others}.")
    if fixed:
        sizes = joined(list(dict.fromkeys(cache.text(row.id) for row in fixed)))
        said.insert(0, f"The cache of {_labels(fixed)} stops growing, at {sizes}.")
    said += _quality_for_bytes(results, bits, cache)
    wrong = [
        f"{row.label} ({speed.cache} against {speed.cache_predicted} bytes)"
        for row, speed in timed
        if speed.cache != speed.cache_predicted
    ]
    if wrong:
        said.append(f"The cache that was allocated is not the one that was predicted for {joined(wrong)}.")
    return " ".join(said)


def _quality_for_bytes(results: Results, bits: Measure, cache: Measure) -> list[str]:
    """The smallest cache with the quality of the best row, then the same among the caches that are smaller still."""
    left = {row: bits.samples[row].mean for row in bits.samples if row in cache.samples}
    if len(left) < 2:
        return []
    steps: list[str] = []
    while left:
        best = min(left, key=lambda row: left[row])
        equal = [row for row in left if row == best or not bits.separates(row, best)]
        chosen = min(equal, key=lambda row: (cache.samples[row].mean, left[row]))
        steps.append(chosen)
        left = {row: mean for row, mean in left.items() if cache.samples[row].mean < cache.samples[chosen].mean}
    first, *smaller = (f"{_label(results, row)} ({cache.text(row)}, {bits.text(row)} bits per byte)" for row in steps)
    if not smaller:
        return [
            f"The smallest cache of all, that of {first}, comes with bits per byte indistinguishable from the best."
        ]
    return [
        f"The smallest cache whose bits per byte cannot be distinguished from the best is that of {first}; of the "
        f"caches smaller still, the same way, that of {', then of '.join(smaller)}."
    ]


def _on_task(results: Results, task: str, explained: set[str]) -> str | None:
    measure = hardest(results, task)
    if measure is None or measure.place is None or len(measure.samples) < 2:
        return None
    name, place = _TASK_NAMES[task], measure.place
    ranked, leaders = measure.ranked(), measure.leaders()
    best = measure.samples[ranked[0]].mean
    if best < LEARNED:
        return (
            f"No row learned {name}, so it does not tell the rows apart here: the best, {_label(results, ranked[0])}, "
            f"answers {units.percent(best)} at {place}."
        )
    margin = f"differences under {units.rounded(100 * measure.margin, 2)} points are not counted"
    hard = f"At the hardest {name} that a row learned ({place})"
    if len(leaders) == len(ranked):
        return (
            f"{hard} no row can be distinguished from the best: all answer at least "
            f"{units.percent(measure.samples[ranked[-1]].mean)} ({margin})."
        )
    behind = [row for row in results.rows if row.id in measure.samples and row.id not in leaders]
    listed = joined([f"{row.label} ({units.percent(measure.samples[row.id].mean)})" for row in behind])
    said = [
        f"{hard} {_label(results, ranked[0])} answers {units.percent(best)}. These fall behind it: {listed}; {margin}.",
        *_distance(results, task, place, behind),
        *_causes([row for row in behind if row.id not in explained]),
    ]
    spared = [row for row in results.rows if row.id in leaders and (row.looks_past or _fixed(row))]
    if spared and not explained.issuperset(row.id for row in spared):
        said.append(f"Nothing that can be claimed is lost at this length by {_labels(spared)}.")
    explained.update(row.id for row in (*behind, *spared))
    return " ".join(said)


def _distance(results: Results, task: str, place: Place, behind: Sequence[Row]) -> list[str]:
    """Which rows lose only at the longer length, everything else being equal."""
    shorter = [p for p in results.places(task) if p.pairs == place.pairs and p.length < place.length]
    if not shorter:
        return []
    near = accuracy(results, task, shorter[0])
    level = [row for row in behind if row.id in near.leaders()]
    if not level or _top(near) < LEARNED:
        return []
    length = shorter[0].length
    return [
        f"At {length} tokens {_labels(level)} cannot be distinguished from the best yet: the loss comes with distance."
    ]


def _causes(behind: Sequence[Row]) -> list[str]:
    """Why rows fall behind, where their caches and masks show it."""
    fixed = [row for row in behind if _fixed(row) and row.looks_past]
    sums = [row for row in behind if _fixed(row) and not row.looks_past]
    hiding = [row for row in behind if row.looks_past and not _fixed(row)]
    said = []
    if fixed:
        said.append(
            f"The cache of {_labels(fixed)} holds a fixed number of keys, so what lies further back has left it."
        )
    if sums:
        said.append(f"The state of {_labels(sums)} has a fixed size, which all that was read has to share.")
    if hiding:
        said.append(
            f"By their masks the queries of {_labels(hiding)} miss some of the earlier keys; what they miss can only "
            "arrive through other positions, a layer at a time."
        )
    return said


def _top(measure: Measure) -> float:
    return max(sample.mean for sample in measure.samples.values())


def _on_decoding(results: Results) -> str | None:
    timed = [(row, row.speed.decode) for row in results.rows if row.speed is not None and row.speed.decode]
    common = sorted(set.intersection(*(set(decode) for _, decode in timed))) if timed else []
    if len(timed) < 2 or not common:
        return None
    short, long = common[0], common[-1]
    said = []
    if short < long:
        # What two times, each off by the noise in the worse direction, could show by themselves.
        still = (1 + results.timing) / max(0.1, 1 - results.timing)
        growth = {row.id: decode[long] / decode[short] for row, decode in timed}
        growing = sorted((row for row, _ in timed if growth[row.id] > still), key=lambda row: -growth[row.id])
        flat = [row for row, _ in timed if growth[row.id] <= still]
        span = f"from {short} to {long} tokens of context"
        if growing:
            times = joined([f"{row.label} {units.rounded(growth[row.id], 2)}" for row in growing])
            said.append(f"The time of a decoded token grows {span} by these factors: {times}.")
            fixed = ", where the cache does not grow either" if all(_fixed(row) for row in flat) else ""
            said += [f"It does not grow beyond the noise for {_labels(flat)}{fixed}."] if flat else []
        else:
            said.append(f"The time of a decoded token does not grow beyond the noise {span}, whatever the row.")
    measure = decode_time(results, long)
    ranked, leaders = measure.ranked(), measure.leaders()
    low, high = measure.samples[ranked[0]].mean, measure.samples[ranked[-1]].mean
    if len(leaders) == len(ranked):
        said.append(
            f"At {long} tokens no row decodes faster than another beyond the noise ({units.rounded(low)} to "
            f"{units.milliseconds(high)} a token)."
        )
    else:
        first, last = (_label(results, row) for row in (ranked[0], ranked[-1]))
        level = f" (indistinguishable from it: {_labels_of(results, leaders[1:])})" if leaders[1:] else ""
        said.append(
            f"At {long} tokens the fastest is {first} with {units.milliseconds(low)} a token{level}, the slowest "
            f"{last} with {units.milliseconds(high)}, {units.rounded(high / low, 2)} times as long."
        )
    return " ".join(said)


def _on_kernels(results: Results) -> str | None:
    ratios = [kernel.ratio for kernel in results.kernels if kernel.ratio is not None]
    shares = [kernel.share for kernel in results.kernels if kernel.share is not None]
    said = []
    if ratios:
        span = _span([units.rounded(f(ratios), 2) for f in (min, max)])
        reached = _span([units.points(f(shares)) for f in (min, max)]) if shares else ""
        share = f" and reach {reached} % of the limit that binds them" if shares else ""
        said.append(f"The native kernels are {span} times as fast as torch's{share}.")
    slow = [k for k in results.kernels if k.ratio is not None and k.ratio <= 1 + results.timing]
    missed = [k for k in results.kernels if not k.meets_floors and k.wrong is None]
    wrong = [k for k in results.kernels if k.wrong is not None]
    for kernels, what in (
        (slow, "Not faster than torch beyond the noise"),
        (missed, "Below the floors that attnkit sets itself"),
        (wrong, "Wrong in its result, and so without a speed"),
    ):
        if kernels:
            named = joined([f"{kernel.id} {kernel.work}" for kernel in kernels])
            said.append(f"{what}: {named if len(kernels) < len(results.kernels) else 'every kernel'}.")
    if results.others > QUIET:
        said.append(
            f"Other programs kept {units.rounded(results.others, 2)} cores of this machine busy meanwhile: on a quiet "
            "machine times are better, and may order the rows differently."
        )
    return " ".join(said) or None


def _span(ends: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def _on_scope(results: Results) -> str | None:
    runs = [run for row in results.rows for run in row.text.values()]
    said = []
    if runs:
        parameters = _span([units.count(f(run.parameters for run in runs)) for f in (min, max)])
        tokens = _span([units.count(f(run.tokens for run in runs)) for f in (min, max)])
        said.append(
            f"All of this is about models of {parameters} parameters that read {tokens} tokens: larger models, longer "
            "training or another text may order the rows differently."
        )
    said += _hybrids(results)
    diverged = [row for row in results.rows if any(run.bits_per_byte is None for run in row.text.values())]
    if diverged:
        said.append(f"Training diverged for {_labels(diverged)} with at least one seed, which is left out of the mean.")
    return " ".join(said) or None


def _hybrids(results: Results) -> list[str]:
    """Small models may have fewer layers than a hybrid's pattern, so what the layers really were is told."""
    said = []
    for row in (row for row in results.rows if row.layers):
        made: dict[str, list[str]] = {}
        for kind, layers in row.layers.items():
            counts = joined([f"{layers.count(layer)} {layer}" for layer in dict.fromkeys(layers)])
            made.setdefault(counts, []).append(_MEASURED.get(kind, kind))
        where = [f"{counts} for {joined(kinds)}" for counts, kinds in made.items()]
        said.append(f"The layers of {row.label} were {'; '.join(where) if len(where) > 1 else next(iter(made))}.")
    return said


def _learned_tasks(results: Results) -> list[Measure]:
    """The tasks that at least one row learned, each where it is hardest: others cannot tell rows apart."""
    found = [measure for task in TASKS if (measure := hardest(results, task))]
    return [measure for measure in found if _top(measure) >= LEARNED]


def _fixed(row: Row) -> bool:
    return row.speed is not None and not row.speed.token_bytes


def _plain(measure: Measure) -> str:
    return "bits per byte" if measure.name == "bits" else _TASK_NAMES[measure.name]


def _labels(rows: Iterable[Row]) -> str:
    return joined([row.label for row in rows])


def _label(results: Results, row: str) -> str:
    return next(known.label for known in results.rows if known.id == row)


def _labels_of(results: Results, rows: Iterable[str]) -> str:
    return joined([_label(results, row) for row in rows])
