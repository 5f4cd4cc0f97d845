"""Peak memory of every mechanism on a long sequence, each call in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from attnkit.bench.host import provenance
from attnkit.bench.results import Line
from attnkit.dispatch import decide
from attnkit.registry import get, mechanisms
from attnkit.spec import Mechanism, Sizes
from attnkit.state import RecurrentState
from attnkit.testing.runs import results, tensors

LENGTH, LONG, HEADS, SIZE = 8192, 16384, 8, 64
LIMIT_MIB = 2048.0
"""What one float32 table of all pairs of 8 heads over 8,192 tokens takes."""
CHUNK = 64
"""Tokens a recurrent mechanism may keep a state for."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Work = Literal["forward", "training", "recurrent training"]
WORKS: tuple[Work, ...] = ("forward", "training")


@dataclass(frozen=True)
class Peak:
    """What one call took beyond its arguments at its worst moment, its results included."""

    mechanism: str
    work: Work
    backend: str
    n: int
    mib: float
    limit_mib: float = LIMIT_MIB

    @property
    def holds(self) -> bool:
        return self.mib < self.limit_mib

    def line(self) -> Line:
        """The record of a results file."""
        rounded = {"mib": round(self.mib, 1), "limit_mib": round(self.limit_mib, 1)}
        return {"kind": "memory", **asdict(self), **rounded, "holds": self.holds}


def works(spec: Mechanism) -> tuple[Work, ...]:
    """What is measured of a mechanism, a row each."""
    return (*WORKS, "recurrent training") if spec.state is RecurrentState else WORKS


def peaks(names: Sequence[str] = (), n: int = LENGTH) -> Iterator[Line]:
    """The lines of a results file: where and how, then each mechanism's forward and training call when it is done.

    ``names`` are mechanisms, all when none is given. Eight heads of 64 in float32, one sequence of ``n`` tokens.
    Where a state of one size stands for all tokens, one more row trains on twice as many (see ``recurrent``).
    Raises ``NotImplementedError`` where the system does not tell the peak of a process.
    """
    if not CLEAR.exists():
        raise NotImplementedError(f"peak memory is read from {STATUS}, which this system does not have: use Linux")
    specs = [get(name) for name in names] or list(mechanisms().values())
    yield provenance({"memory": [spec.name for spec in specs], "n": n, "threads": torch.get_num_threads()})
    for spec in specs:
        for work in works(spec):
            yield (measure(spec, work, n) if work in WORKS else recurrent(spec, n * LONG // LENGTH)).line()


def recurrent(spec: Mechanism, n: int = LONG) -> Peak:
    """Training of a mechanism with a state of one size, beyond the gradients that it hands out.

    Its limit is half as much again as the forward call takes, and a state every 64 tokens: a state kept for every token
    would be 64 times that.
    """
    forward, training = (measure(spec, work, n) for work in WORKS)
    sizes = Sizes(b=1, h=HEADS, g=HEADS, m=n, n=n, d=SIZE, e=SIZE)
    handed = sum(x.nbytes for x in tensors(spec.sample(0, sizes, torch.float32)).values())
    states = spec.cost(sizes).state_bytes_fixed * n // CHUNK
    limit = 1.5 * forward.mib + states / 2**20
    return Peak(spec.name, "recurrent training", training.backend, n, training.mib - handed / 2**20, limit)


def measure(spec: Mechanism, work: Work, n: int = LENGTH) -> Peak:
    """The peak of one call of the mechanism, on the backend that dispatch takes."""
    # A fresh process: memory that an earlier call left to the allocator would be used again unseen.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        backend, mib = pool.submit(_peak, spec.name, work, n, torch.get_num_threads()).result()
    return Peak(spec.name, work, backend, n, mib)


def _peak(name: str, work: Work, n: int, threads: int) -> tuple[str, float]:
    torch.set_num_threads(threads)
    spec = get(name)
    _call(spec, work, _arguments(spec, work, 8))  # what a first call loads and starts is not counted
    arguments = _arguments(spec, work, n)
    chosen, _ = decide(spec, spec.call(**arguments))
    before = _kilobytes("VmRSS")
    CLEAR.write_text("5")  # the peak starts again from here
    _call(spec, work, arguments)
    return chosen.name, (_kilobytes("VmHWM") - before) / 1024


def _arguments(spec: Mechanism, work: Work, n: int) -> dict[str, Any]:
    made = spec.sample(0, Sizes(b=1, h=HEADS, g=HEADS, m=n, n=n, d=SIZE, e=SIZE), torch.float32)
    return made | ({name: x.requires_grad_() for name, x in tensors(made).items()} if work == "training" else {})


def _call(spec: Mechanism, work: Work, arguments: dict[str, Any]) -> None:
    found = results(spec.function(**arguments))
    if work == "training":
        torch.stack([x.sum() for x in found if x.requires_grad]).sum().backward()


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise NotImplementedError(f"{STATUS} has no {field}: peak memory cannot be read on this system")
