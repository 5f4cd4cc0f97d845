"""What this machine can do at most: arithmetic and reading memory, at the instruction level of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from attnkit import native
from attnkit.bench.sizes import Limit

# Well past every cache, or what is measured is the cache.
BUFFER_BYTES = 256 << 20
PROBE_SECONDS = 0.02
PROBES = 5


@dataclass(frozen=True)
class Limits:
    """Best figures seen, by number of threads: 1e9 operations a second, 1e9 bytes a second.

    ``dot_gflops`` is None when the instruction level has no bfloat16 dot product.
    """

    fma_gflops: dict[int, float]
    dot_gflops: dict[int, float] | None
    read_gbs: dict[int, float]

    def line(self) -> dict[str, Any]:
        """The record of a results file."""

        def rounded(figures: dict[int, float]) -> dict[str, float]:
            return {str(threads): round(figure, 1) for threads, figure in figures.items()}

        return {
            "kind": "limits",
            "fma_gflops": rounded(self.fma_gflops),
            "dot_gflops": self.dot_gflops and rounded(self.dot_gflops),
            "read_gbs": rounded(self.read_gbs),
        }


class Probe:
    """Measures one limit again and again, a few hundredths of a second each; ``best`` is the highest figure so far.

    The probes of a row run between its kernels: on a shared machine clock and neighbours change within seconds (47 and
    84 GB/s of reading were seen a minute apart), and a share of a limit measured earlier would mix two machines.
    """

    def __init__(self, limit: Limit, threads: int) -> None:
        self.best = 0.0
        self._run: Callable[[], float]
        if limit == "read":
            self._run = partial(native.read_gigabytes, torch.ones(BUFFER_BYTES // 4), threads, PROBE_SECONDS)
        elif limit == "dot" and native.bf16_dot_gflops(threads, PROBE_SECONDS):
            self._run = partial(native.bf16_dot_gflops, threads, PROBE_SECONDS)
        elif limit == "bytes" and native.bf16_dot_gflops(threads, PROBE_SECONDS):
            # A product of bytes sums twice the channels of one of bfloat16, at the same rate where both exist.
            self._run = lambda: 2 * native.bf16_dot_gflops(threads, PROBE_SECONDS)
        else:  # without the instruction bfloat16 is widened, and float32 arithmetic is the limit
            self._run = partial(native.fma_gflops, threads, PROBE_SECONDS)

    def __call__(self) -> float:
        figure: float = self._run()
        self.best = max(self.best, figure)
        return figure


def limits(threads: Sequence[int] = ()) -> Limits:
    """Measure the limits with each number of threads; with one thread and with all of torch's when none is given."""
    counts = tuple(dict.fromkeys(threads or (1, torch.get_num_threads())))
    has_dot = native.bf16_dot_gflops(1, PROBE_SECONDS) > 0
    kinds: tuple[Limit, ...] = ("fma", "dot", "read") if has_dot else ("fma", "read")
    probes = {(kind, count): Probe(kind, count) for kind in kinds for count in counts}
    for _ in range(PROBES):
        for probe in probes.values():
            probe()
    best: dict[Limit, dict[int, float]] = {
        kind: {count: probes[kind, count].best for count in counts} for kind in kinds
    }
    return Limits(best["fma"], best.get("dot"), best["read"])
