"""Times one case: ours, torch's and the machine's limit in turn, so that all three meet the same neighbours."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from attnkit.bench.host import Others, provenance
from attnkit.bench.probes import Probe, limits
from attnkit.bench.results import Line
from attnkit.bench.sizes import Case, cases
from attnkit.testing.runs import assert_matches

OURS, TORCH, FLEX = "cpu", "sdpa", "flex"
# Seven is the least whose median shrugs off three disturbed runs; short calls are repeated for as long as this takes.
ROUNDS, MOST_ROUNDS, SECONDS = 7, 31, 1.0
# Lengths of the check: no block size divides them, so that it meets ragged edges, and decoding splits its keys.
CHECKED_PREFILL, CHECKED_DECODE = 201, 4099


@dataclass(frozen=True)
class Result:
    """One row: median milliseconds, 1e9 operations or bytes a second, the limit in the same unit, and the floors.

    ``ratio`` is torch's time over ours and ``share`` our part of the limit, medians of what each round gave: a round is
    short enough that ours and torch's met the same machine. ``limit`` is the median of the limits they met. Ratio and
    share are None when ``wrong`` says that our result on a small call of this kind differs from the definition: a
    wrong result has no speed. ``others`` is the number of cores that other programs kept busy meanwhile, ``spread``
    the middle half of our times over their median.
    """

    id: str
    work: str
    model: str
    threads: int
    rounds: int
    others: float
    spread: float
    ours_ms: float
    sdpa_ms: float
    flex_ms: float | None
    rate: float
    unit: str
    limit: float
    ratio: float | None
    share: float | None
    floor_ratio: float
    floor_share: float | None
    wrong: str | None

    @property
    def holds(self) -> bool:
        """Whether the result is right and no floor is missed."""
        if self.ratio is None or self.share is None:
            return False
        return self.ratio >= self.floor_ratio and (self.floor_share is None or self.share >= self.floor_share)

    def line(self) -> Line:
        """The record of a results file."""
        shown = {name: _rounded(value) for name, value in asdict(self).items()}
        return {"kind": "kernel", **shown, "holds": self.holds}


def run(chosen: Sequence[Case], *, flex: bool = False) -> Iterator[Line]:
    """The lines of a results file: where and how, the machine's limits, then each case when it is done."""
    yield provenance({"work": [case.work for case in chosen], "flex": flex, "threads": torch.get_num_threads()})
    yield limits().line()
    for case in chosen:
        yield measure(case, flex=flex).line()


def rows(ids: Sequence[str] = (), quick: bool = False) -> Iterator[Result]:
    """Measure the figures named, such as ``("K1", "K5")``, all when none is; a row is yielded when it is done."""
    for case in cases(ids, quick):
        yield measure(case)


def measure(case: Case, *, flex: bool = False) -> Result:
    """Time one case with torch's number of threads; with ``flex`` also compiled FlexAttention, which takes its time."""
    wrong = check(case)
    arguments = case.arguments()
    names = [OURS, TORCH]
    if flex and not case.spec.backend(FLEX).rejects(case.spec.call(**arguments)):
        names.append(FLEX)
    calls = {name: partial(case.spec.function, **arguments, backend=name) for name in names}
    probe = Probe(case.limit, torch.get_num_threads())
    times: dict[str, list[float]] = {name: [] for name in names}
    probed: list[float] = []
    for call in calls.values():
        call()
    # Time that others take from the only thread does not count; that of several threads waiting for one another must.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    others = Others()
    end = time.perf_counter() + SECONDS
    while len(times[OURS]) < ROUNDS or (time.perf_counter() < end and len(times[OURS]) < MOST_ROUNDS):
        for name, call in calls.items():
            # Before every run, ours and theirs: reading the probe's memory leaves both with cold caches, as the other
            # layers of a model do.
            probed.append(probe())
            start = clock()
            call()
            times[name].append(clock() - start)
    seconds = {name: median(found) for name, found in times.items()}
    first, _, third = quantiles(times[OURS])
    cost = case.cost()
    unit, amount = ("GB/s", cost.bytes) if case.limit == "read" else ("GFLOP/s", cost.flops)
    rate = amount / seconds[OURS] / 1e9
    found_limits = _limits(probed, len(names), moving=case.limit == "read")
    share = median(amount / took / 1e9 / limit for took, limit in zip(times[OURS], found_limits, strict=True))
    ratio = median(theirs / ours for ours, theirs in zip(times[OURS], times[TORCH], strict=True))
    return Result(
        id=case.id,
        work=case.work,
        model=case.model,
        threads=torch.get_num_threads(),
        rounds=len(times[OURS]),
        others=others.cores(),
        spread=(third - first) / seconds[OURS],
        ours_ms=seconds[OURS] * 1e3,
        sdpa_ms=seconds[TORCH] * 1e3,
        flex_ms=seconds[FLEX] * 1e3 if FLEX in seconds else None,
        rate=rate,
        unit=unit,
        limit=median(found_limits),
        ratio=None if wrong else ratio,
        share=None if wrong else share,
        floor_ratio=case.floor_ratio,
        floor_share=case.floor_share,
        wrong=wrong,
    )


def _limits(probed: Sequence[float], calls: int, *, moving: bool) -> list[float]:
    """The limit that each of our calls met: arithmetic's is the best of all probes, for disturbance only lowers it.

    Bandwidth moves with what neighbours outside this machine read (47 and 84 GB/s were seen a minute apart), so there
    it is the better of the probes right before and right after the call.
    """
    if not moving:
        return [max(probed)] * (len(probed) // calls)
    return [max(probed[i : i + 2]) for i in range(0, len(probed), calls)]


def check(case: Case) -> str | None:
    """What is wrong with our result on a small call of the same kind, judged as the tests do; None when nothing is.

    In float32 first: the rounding of half precision hides a mistake as large as a scale that is 1 % off.
    """
    s = case.sizes
    n = CHECKED_DECODE if case.decodes else CHECKED_PREFILL
    g = min(s.g, 2)
    small = replace(s, h=g * s.h // s.g, g=g, m=1 if case.decodes else n, n=n)
    for dtype in dict.fromkeys(("float32", case.dtype)):
        try:
            assert_matches(case.spec, OURS, replace(case, dtype=dtype).arguments(small))
        except AssertionError as error:
            return str(error)
    return None


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
