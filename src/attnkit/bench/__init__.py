"""Kernels against their peers and against this machine's limits, measured in one run.

>>> from attnkit import bench
>>> bench.limits().read_gbs  # doctest: +SKIP
>>> for row in bench.rows(["K5"], quick=True):  # doctest: +SKIP
...     print(row.work, row.ratio, row.share)
"""

from __future__ import annotations

from attnkit.bench.host import PACKAGE, QUIET, checkout, commit, cores, cpu_model, machine, provenance
from attnkit.bench.memory import Peak, peaks
from attnkit.bench.probes import Limits, limits
from attnkit.bench.results import Exponent, Line, exponents, read, split, unfinished, upgraded, written
from attnkit.bench.sizes import Case, Floors, Way, cases, suites
from attnkit.bench.timing import Result, measure, rows, run

__all__ = [
    "PACKAGE",
    "QUIET",
    "Case",
    "Exponent",
    "Floors",
    "Limits",
    "Line",
    "Peak",
    "Result",
    "Way",
    "cases",
    "checkout",
    "commit",
    "cores",
    "cpu_model",
    "exponents",
    "limits",
    "machine",
    "measure",
    "peaks",
    "provenance",
    "read",
    "rows",
    "run",
    "split",
    "suites",
    "unfinished",
    "upgraded",
    "written",
]
