"""Runs of compare that never ran, with numbers that a test can plan; and a browser to look at what is made of them."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from attnkit import masks

Line = dict[str, Any]
CONTEXTS = (256, 512, 1024, 2048, 4096)

# id: title, mask, bits per byte, KV heads (of 4), keys kept (None: all), how far it recalls, accuracy where it does not
ROWS: dict[str, tuple[str, masks.Mask, float, float, int | None, int, float]] = {
    "mha": ("Multi-head (MHA)", masks.causal(), 2.31, 4, None, 10_000, 0.0),
    "mqa": ("Multi-query (MQA)", masks.causal(), 2.345, 1, None, 10_000, 0.0),
    "gqa": ("Grouped-query (GQA)", masks.causal(), 2.318, 2, None, 10_000, 0.0),
    "window": ("Sliding window", masks.window(64), 2.36, 4, 64, 100, 0.22),
    "window_sinks": (
        "Window + 4 first tokens",
        (masks.window(64) | masks.global_tokens(4)) & masks.causal(),
        2.355,
        4,
        68,
        100,
        0.26,
    ),
    "dilated": ("Dilated window", masks.dilated_window(64, 2), 2.41, 4, None, 160, 0.31),
    "strided": ("Strided (Sparse Transformer)", masks.strided(32), 2.335, 4, None, 200, 0.71),
    "global_local": ("Global + local layers", masks.window(64), 2.315, 2.2, None, 10_000, 0.0),
}


def run_line(rows: Sequence[str], seeds: Sequence[int], **settings: Any) -> Line:
    return {
        "kind": "run",
        "format": 1,
        "attnkit": "0.1.0",
        "torch": "2.13.0+cpu",
        "machine": {"cpu": "AMD EPYC 9B45", "cores": 2, "level": "v4bf16"},
        "commit": "0b909db",
        "settings": {
            "quick": len(seeds) == 1,
            "text": "Shakespeare's plays",
            "bytes": 5_436_475,
            "tokenizer": "bytes",
            "seeds": list(seeds),
            "rows": list(rows),
        }
        | settings,
        "started": "2026-11-22T12:00:00+00:00",
    }


def text_line(row: str, seed: int, bits: float, *, tokens: int = 1_200_000, rate: float = 19_000.0) -> Line:
    steps = [tokens * step // 24 for step in range(1, 25)]
    curve = [[at, bits + 3.4 * math.exp(-7 * at / tokens) + 0.25 * (1 - at / tokens)] for at in steps]
    return {
        "kind": "text",
        "row": row,
        "seed": seed,
        "parameters": 812_672,
        "tokens": tokens,
        "bits_per_byte": bits,
        "curve": curve,
        "train_tokens_per_second": rate,
        "backend": "sdpa",
        "seconds": tokens / rate,
    }


def task_line(task: str, row: str, seed: int, accuracy: Callable[[int, int], float]) -> Line:
    grid = [(n, p) for n in (64, 128, 256) for p in (4, 8, 16, 32) if task == "recall" and 4 * p <= n]
    grid = grid or [(n, 0) for n in (64, 128, 256, 512)]
    _, _, _, heads, kept, *_ = ROWS[row]
    token = int(2 * 2 * heads * 16 * 4)
    points = [
        {"length": n, "accuracy": accuracy(n, p), "state_bytes": token * min(n, kept or n)}
        | ({"pairs": p} if p else {})
        for n, p in grid
    ]
    return {
        "kind": "task",
        "task": task,
        "row": row,
        "seed": seed,
        "points": points,
        "state_bytes_per_token": 0 if kept else token,
        "tokens": 6_000_000,
        "backend": "sdpa",
        "seconds": 40.0,
    }


def speed_line(row: str, *, heads: float = 4, kept: int | None = None, contexts: Sequence[int] = CONTEXTS) -> Line:
    def held(n: int) -> int:
        return n if kept is None else min(n, kept)

    per_token = int(2 * 4 * heads * 32 * 4)
    longest = contexts[-1]
    return {
        "kind": "speed",
        "row": row,
        "prefill_tokens_per_second": 61_000.0 * (1.0 if kept is None else 1.35),
        "prefill_backend": "cpu",
        "decode": [{"context": n, "ms": 0.42 + 1.1e-4 * held(n) * heads / 2} for n in contexts],
        "decode_backend": "cpu",
        "cache_bytes_per_token": per_token if kept is None else 0,
        "cache_allocated": per_token * held(longest),
        "cache_predicted": per_token * held(longest),
        "context": longest,
    }


def accuracy(row: str, chance: random.Random, length: int, pairs: int) -> float:
    """Nearly all right as far as the row of the table above reaches; behind it, what it says, falling with length."""
    *_, reach, lost = ROWS[row]
    right = 0.995 - 0.0004 * pairs if length <= reach else lost + 0.4 * (1 - length / 600) - 0.004 * pairs
    return min(1.0, max(0.0, right + chance.gauss(0, 0.004)))


def example(
    *, seeds: Sequence[int] = (0,), rows: Sequence[str] = tuple(ROWS), tasks: Sequence[str] = ("recall",)
) -> list[Line]:
    """A whole run with numbers of the size that real ones have."""
    lines: list[Line] = [run_line(rows, seeds)]
    lines.append(
        {
            "kind": "limits",
            "fma_gflops": {"1": 96.0, "2": 188.0},
            "dot_gflops": {"1": 370.0, "2": 715.0},
            "read_gbs": {"1": 22.5, "2": 41.0},
        }
    )
    for name, work, ours, sdpa, share, floor, floor_share in (
        ("K1", "prefill fp32 causal h8 d64 n2048", 14.1, 38.2, 0.81, 2.2, 0.75),
        ("K1", "prefill fp32 full h8 d128 n4096", 190.0, 480.0, 0.84, 2.2, 0.75),
        ("K2", "prefill bf16 causal h8 d64 n2048", 5.2, 36.0, 0.62, 4.0, 0.65),
        ("K5", "decode fp32 32/8 d128 n32768", 6.8, 24.1, 0.83, 3.0, 0.8),
        ("K5", "decode bf16 32/8 d128 n32768", 3.4, 88.0, 0.81, 20.0, 0.8),
    ):
        lines.append(
            {
                "kind": "kernel",
                "id": name,
                "work": work,
                "ours_ms": ours,
                "sdpa_ms": sdpa,
                "ratio": sdpa / ours,
                "share": share,
                "floor_ratio": floor,
                "floor_share": floor_share,
            }
        )
    for row in rows:
        title, mask, *_ = ROWS[row]
        lines.append({"kind": "mask", "row": row, "title": title, "n": 256, "picture": mask.draw(256)})
    for row in rows:
        _, _, bits, heads, kept, *_ = ROWS[row]
        for seed in seeds:
            chance = random.Random(f"{row} {seed}")
            lines.append(text_line(row, seed, bits + chance.gauss(0, 0.006), rate=19_000 * (1 - 0.02 * heads)))
            for task in tasks:
                lines.append(task_line(task, row, seed, partial(accuracy, row, chance)))
        lines.append(speed_line(row, heads=heads, kept=kept))
    return lines


@pytest.fixture(scope="session")
def quick_run() -> list[Line]:
    """Eight rows, one seed, recall only: what ``--quick`` writes."""
    return example()


@pytest.fixture(scope="session")
def full_run() -> list[Line]:
    """Eight rows, three seeds, every task."""
    return example(seeds=(0, 1, 2), tasks=("recall", "copy", "needle"))


@pytest.fixture
def make_run() -> Callable[..., list[Line]]:
    """``example``, for a run of other rows, seeds or tasks."""
    return example


class Chromium:
    """A headless browser without a network, driven over a pipe by the DevTools protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser reads descriptor 3 and writes 4; from 10 up no copy can overwrite another's source.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, from_browser)]
        quiet = [(os.POSIX_SPAWN_OPEN, end, os.devnull, os.O_RDWR, 0) for end in (1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, end, name) for end, name in zip(high, (3, 4), strict=True)]
        options = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
        ).split()
        options += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        self._process = os.posix_spawn(
            program, [program, *options], dict(os.environ), file_actions=[*quiet, *pipes], setpgroup=0
        )
        for end in (to_browser, from_browser, *high):
            os.close(end)
        self._count, self._rest, self.events = 0, b"", list[dict[str, Any]]()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    _session = ""

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(
            self._out, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self.events.append(answer)

    def _read(self, seconds: float = 60) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._in, 1 << 16) if ready else b""
            if not data:
                raise TimeoutError(f"Chromium said nothing for {seconds} seconds or has stopped")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def evaluate(self, expression: str) -> Any:
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(self, path: Path, *, width: int = 1400, scheme: str = "light") -> None:
        """Show a file and wait until it says that its charts are drawn."""
        self.events.clear()
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && (document.documentElement.dataset.drawn || !window.vegaEmbed)")

    def wait(self, expression: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"still not so after {seconds} seconds: {expression}"
            time.sleep(0.05)

    def seen(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of the events of these kinds since the page was opened."""
        self.evaluate("0")
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self) -> None:
        with suppress(OSError, TimeoutError):
            os.write(self._out, b'{"id":0,"method":"Browser.close"}\0')
        end = time.monotonic() + 10
        while os.waitpid(self._process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.killpg(self._process, signal.SIGKILL)
            time.sleep(0.05)
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(names)} is on the path")
    chromium = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()
