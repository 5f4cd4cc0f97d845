"""How fast each row runs and how much it keeps: whole decoders, measured in turns.

Rows take turns within each round, so that what else the machine does meets all of them alike; the median of the rounds
is reported. The decoders are untrained: time does not depend on the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from attnkit.bench.host import Others
from attnkit.compare.rows import Row
from attnkit.compare.store import Line
from attnkit.compare.workers import Progress
from attnkit.dispatch import watch
from attnkit.models.decoder import Decoder, DecoderConfig, match_parameters
from attnkit.spec import LayerPlace


@dataclass(frozen=True)
class SpeedPlan:
    """What is timed.

    Eight heads of 64 make the KV cache of a small real model (MHA: 4 kB a token and layer); two layers are enough, as
    the second repeats the first except where a row alternates kinds of layers. ``parameters`` is what MHA has with a
    feed-forward of 8/3 the width, as in Llama.
    """

    parameters: int = 6_424_000
    width: int = 512
    heads: int = 8
    layers: int = 2
    vocab: int = 256
    window: int = 128
    prompt: int = 2048
    contexts: tuple[int, ...] = (512, 2048, 8192)
    rounds: int = 7
    steps: int = 8


QUICK = SpeedPlan()
FULL = SpeedPlan(prompt=4096, contexts=(512, 2048, 8192, 16384), rounds=15)
_CHUNK = 512
"""Tokens fed at once to reach a context."""


class _Subject:
    """One row's decoder, fed the same tokens as the others'."""

    def __init__(self, row: Row, plan: SpeedPlan, tokens: Tensor) -> None:
        self.row, self.plan, self.tokens = row, plan, tokens
        self.model = decoder(row, plan)
        self.state = self.model.state(1, plan.contexts[-1])
        self.held = 0

    def prefill(self) -> float:
        """Seconds for the prompt."""
        start = time.perf_counter()
        self.model(self.tokens[:, : self.plan.prompt])
        return time.perf_counter() - start

    def feed(self, until: int) -> None:
        """Bring the state to ``until`` tokens."""
        while self.held < until:
            self._step(min(_CHUNK, until - self.held))

    def decode(self) -> float:
        """Seconds for a token: the median of the next few, of which the first finds the weights out of cache."""
        seconds = []
        for _ in range(self.plan.steps):
            start = time.perf_counter()
            self._step(1)
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    def _step(self, count: int) -> None:
        _, self.state = self.model.step(self.tokens[:, self.held : self.held + count], self.state)
        self.held += count


def decoder(row: Row, plan: SpeedPlan) -> Decoder:
    """The decoder that is timed for ``row``."""

    def mixer(layer: int) -> nn.Module:
        return row.layer(LayerPlace(plan.width, plan.heads, plan.window, layer, plan.layers))

    config = DecoderConfig(plan.vocab, plan.width, plan.layers)
    return Decoder(match_parameters(config, mixer, plan.parameters), mixer).eval()


def cache(model: Decoder, capacity: int) -> tuple[int, int]:
    """Bytes that the state of one sequence of ``capacity`` tokens takes, and the bytes that ``cost`` predicts."""
    allocated = model.state(1, capacity).nbytes
    mixers: list[Any] = [block.mixer for block in model.layers]
    predicted = sum(mixer.cost(1, capacity).state_bytes(capacity) for mixer in mixers)
    return allocated, predicted


@torch.inference_mode()
def speed(rows: Sequence[Row], plan: SpeedPlan, progress: Progress) -> list[Line]:
    """One line a row: prefill, decoding at each context, and the cache of the longest."""
    longest = plan.contexts[-1]
    tokens = torch.randint(plan.vocab, (1, max(plan.prompt, longest)), generator=torch.Generator().manual_seed(0))
    subjects = [_Subject(row, plan, tokens) for row in rows]
    turns = count(1)
    total = len(rows) * (1 + plan.rounds) * (1 + len(plan.contexts))

    def measure(once: Callable[[_Subject], float]) -> list[_Timing]:
        """Warm every subject up, watching what runs; then let them take turns."""
        backends, seconds = [], [list[float]() for _ in rows]
        for subject in subjects:
            with watch() as ran:
                once(subject)
            backends.append("+".join(sorted({backend for _, backend in ran})))
            progress(next(turns) / total)
        for _ in range(plan.rounds):
            for subject, mine in zip(subjects, seconds, strict=True):
                mine.append(once(subject))
                progress(next(turns) / total)
        return [_timing(mine, backend) for mine, backend in zip(seconds, backends, strict=True)]

    others = Others()
    prefill = measure(_Subject.prefill)
    decode = []
    for context in plan.contexts:
        start = context - (1 + plan.rounds) * plan.steps
        for subject in subjects:
            subject.feed(start)
        decode.append(measure(_Subject.decode))
    lines = []
    for index, subject in enumerate(subjects):
        allocated, predicted = cache(subject.model, longest)
        shorter, _ = cache(subject.model, longest // 2)
        lines.append(
            {
                "kind": "speed",
                "row": subject.row.name,
                "name": subject.row.title,
                "prefill_tokens_per_second": round(plan.prompt / prefill[index].seconds, 1),
                "prefill_backend": prefill[index].backend,
                "decode": [
                    {"context": context, "ms": round(timings[index].seconds * 1e3, 4)}
                    for context, timings in zip(plan.contexts, decode, strict=True)
                ],
                "decode_backend": decode[-1][index].backend,
                "cache_bytes_per_token": (allocated - shorter) // (longest - longest // 2),
                "cache_allocated": allocated,
                "cache_predicted": predicted,
                "context": longest,
                "spread": round(max(timings[index].spread for timings in (prefill, decode[-1])), 4),
                "others": round(others.cores(), 2),
            }
            | ({"layers": subject.row.kinds(plan.layers)} if subject.row.hybrid else {})
        )
    return lines


@dataclass(frozen=True)
class _Timing:
    """The median of the rounds, and how wide their middle half is, in parts of it."""

    seconds: float
    spread: float
    backend: str


def _timing(seconds: list[float], backend: str) -> _Timing:
    first, middle, third = quantiles(seconds)
    return _Timing(middle, (third - first) / middle, backend)
