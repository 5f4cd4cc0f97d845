"""Where a figure was measured: the processor, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import attnkit
from attnkit import native
from attnkit.bench.results import FORMAT

PACKAGE = Path(attnkit.__file__).resolve().parent
STAT = Path("/proc/stat")
QUIET = 0.1
"""Cores that others may take before figures are worth a warning."""


def cpu_model() -> str:
    """The processor's name for itself, with family and model where it has them: clouds call many of them the same."""
    info = Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip().lower(), value.strip())
    name = found.get("model name") or found.get("cpu model") or platform.processor() or platform.machine()
    which = [f"{key.removeprefix('cpu ')} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join([name, *which])


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Others:
    """Counts what other programs, and other guests of the same host, take from this machine since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _busy_seconds(), time.process_time()

    def cores(self) -> float:
        """Cores kept busy by others on average; 0 where the system does not tell."""
        wall, busy, ours = (
            now - then
            for now, then in zip((time.perf_counter(), _busy_seconds(), time.process_time()), self._start, strict=True)
        )
        return max(0.0, (busy - ours) / wall)


def _busy_seconds() -> float:
    """Seconds all cores have been busy since the machine started, those stolen by the host included."""
    if not STAT.is_file():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "level": native.get_level() if native.STATUS.available else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def checkout() -> Path | None:
    """The source checkout this package runs from, None when it is installed."""
    root = PACKAGE.parents[1]
    return root if (root / "pyproject.toml").is_file() and PACKAGE.parent.name == "src" else None


def commit() -> str | None:
    """The commit of the checkout, with ``+`` when files differ from it; None outside of one."""
    root = checkout()
    if root is None:
        return None
    found = [_git(root, *words) for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno"))]
    head, changes = found
    return head and head + ("+" if changes else "")


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(settings: dict[str, Any]) -> dict[str, Any]:
    """The first record of a results file: format, versions, machine, commit, settings, time."""
    return {
        "kind": "run",
        "format": FORMAT,
        "attnkit": attnkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(),
        "commit": commit(),
        "settings": settings,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
