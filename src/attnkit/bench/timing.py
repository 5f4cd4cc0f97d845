"""Times one case: ours, the peer's and the machine's limit in turn, so that all three meet the same neighbours."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch

from attnkit.bench import calls, peers
from attnkit.bench.checks import check, check_rows
from attnkit.bench.host import Others, provenance
from attnkit.bench.probes import Probe, limits
from attnkit.bench.results import Line
from attnkit.bench.sizes import Case, cases

OURS, PEER = "ours", "peer"
# Seven is the least whose median shrugs off three disturbed runs; short calls are repeated for as long as this takes.
ROUNDS, MOST_ROUNDS, SECONDS = 7, 31, 1.0


@dataclass(frozen=True)
class Result:
    """One row: median milliseconds, 1e9 operations or bytes a second, the limit in the same unit, and the floors.

    ``ratio`` is the peer's time over ours and ``share`` our part of the limit, medians of what each round gave: a round
    is short enough that ours and the peer's met the same machine. Where ``floor_most`` judges, ``ratio`` is our time
    over the part of the peer's that our work is of its work, and at most that is allowed. ``limit`` is the median of
    the limits they met. Ratio and share are None when ``wrong`` says that our result differs from the definition: a
    wrong result has no speed. Nothing was measured where ``refused`` gives a reason. ``others`` is the number of cores
    that other programs kept busy meanwhile, ``spread`` the middle half of our times over their median, ``also_ms`` the
    times of whoever else was asked for.
    """

    id: str
    suite: str
    work: str
    model: str
    threads: int
    unit: str
    peer: str | None
    floor_ratio: float | None
    floor_most: float | None
    floor_share: float | None
    floor_exponent: float | None
    rounds: int = 0
    others: float = 0.0
    spread: float = 0.0
    ours_ms: float | None = None
    peer_ms: float | None = None
    also_ms: dict[str, float] | None = None
    rate: float | None = None
    limit: float | None = None
    ratio: float | None = None
    share: float | None = None
    wrong: str | None = None
    refused: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the result is right and no floor is missed."""
        if self.ours_ms is None or self.share is None:
            return False
        held = (
            self.floor_ratio is None or (self.ratio is not None and self.ratio >= self.floor_ratio),
            self.floor_most is None or (self.ratio is not None and self.ratio <= self.floor_most),
            self.floor_share is None or self.share >= self.floor_share,
        )
        return all(held)

    def line(self) -> Line:
        """The record of a results file."""
        shown = {name: _rounded(value) for name, value in asdict(self).items()}
        return {"kind": "kernel", **shown, "holds": self.holds}


def run(chosen: Sequence[Case], *, others: Sequence[str] = ()) -> Iterator[Line]:
    """The lines of a results file: where and how, the machine's limits, then each case when it is done."""
    work = [case.work for case in chosen]
    yield provenance({"work": work, "peers": list(others), "threads": torch.get_num_threads()})
    yield limits().line()
    for case in chosen:
        yield measure(case, others=others).line()


def rows(ids: Sequence[str] = (), quick: bool = False) -> Iterator[Result]:
    """Measure the figures named, such as ``("K1", "K5")``, all when none is; a row is yielded when it is done."""
    for case in cases(ids, quick):
        yield measure(case)


def measure(case: Case, *, others: Sequence[str] = ()) -> Result:
    """Time one case with torch's number of threads; ``others`` are more peers, see ``attnkit.bench.peers``.

    A case that this attnkit or this machine cannot run gives a row that says why.
    """
    try:
        return _measured(case, others)
    except NotImplementedError as error:
        return Result(**_about(case), refused=" ".join(str(error).split()))


def _about(case: Case) -> dict[str, Any]:
    return {
        "id": case.id,
        "suite": case.suite,
        "work": case.work,
        "model": case.model,
        "threads": torch.get_num_threads(),
        "unit": "GB/s" if case.limit == "read" else "GFLOP/s",
        "peer": case.peer.name if case.peer else None,
        **{f"floor_{name}": value for name, value in asdict(case.floors).items()},
    }


def _measured(case: Case, others: Sequence[str]) -> Result:
    work = calls.work(case)
    wrong = check(case)
    timed = {OURS: work.ours} | ({PEER: work.peer} if work.peer else {}) | peers.calls(case, others)
    probe = Probe(case.limit, torch.get_num_threads())
    times: dict[str, list[float]] = {name: [] for name in timed}
    probed: list[float] = []
    first_results = {name: call() for name, call in timed.items()}
    wrong = wrong or check_rows(case, work.given, first_results[OURS])
    del first_results
    # Time that others take from the only thread does not count; that of several threads waiting for one another must.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    neighbours = Others()
    end = time.perf_counter() + SECONDS
    while len(times[OURS]) < ROUNDS or (time.perf_counter() < end and len(times[OURS]) < MOST_ROUNDS):
        for name, call in timed.items():
            # Before every run, ours and theirs: reading the probe's memory leaves both with cold caches, as the other
            # layers of a model do.
            probed.append(probe())
            start = clock()
            call()
            times[name].append(clock() - start)
    seconds = {name: median(found) for name, found in times.items()}
    first, _, third = quantiles(times[OURS])
    found_limits = _limits(probed, len(timed), moving=case.limit == "read")
    share = median(work.amount / took / 1e9 / limit for took, limit in zip(times[OURS], found_limits, strict=True))
    also = {name: took * 1e3 for name, took in seconds.items() if name not in (OURS, PEER)}
    return Result(
        **_about(case),
        rounds=len(times[OURS]),
        others=neighbours.cores(),
        spread=(third - first) / seconds[OURS],
        ours_ms=seconds[OURS] * 1e3,
        peer_ms=seconds[PEER] * 1e3 if PEER in seconds else None,
        also_ms=also or None,
        rate=work.amount / seconds[OURS] / 1e9,
        limit=median(found_limits),
        ratio=None if wrong or PEER not in times else _ratio(case, times[OURS], times[PEER]),
        share=None if wrong else share,
        wrong=wrong,
    )


def _ratio(case: Case, ours: Sequence[float], theirs: Sequence[float]) -> float:
    if case.floors.most is not None:
        return median(mine / (their * case.part) for mine, their in zip(ours, theirs, strict=True))
    return median(their / mine for mine, their in zip(ours, theirs, strict=True))


def _limits(probed: Sequence[float], calls: int, *, moving: bool) -> list[float]:
    """The limit that each of our calls met: arithmetic's is the best of all probes, for disturbance only lowers it.

    Bandwidth moves with what neighbours outside this machine read (47 and 84 GB/s were seen a minute apart), so there
    it is the better of the probes right before and right after the call.
    """
    if not moving:
        return [max(probed)] * (len(probed) // calls)
    return [max(probed[i : i + 2]) for i in range(0, len(probed), calls)]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
