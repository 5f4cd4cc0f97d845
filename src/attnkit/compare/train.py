"""Training and judging a decoder: the same batches, rates and number of parameters for every mixer."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnkit import registry
from attnkit.compare import tasks
from attnkit.compare.corpus import Corpus
from attnkit.compare.setups import Shape, TaskSetup, TextSetup, Training
from attnkit.compare.tasks import NOT_ASKED, Batch, Exam
from attnkit.models.decoder import Decoder, DecoderConfig, match_parameters, parameters
from attnkit.spec import LayerPlace

Layer = Callable[[LayerPlace], nn.Module]
"""Makes the mixer that stands at a place of the decoder."""
Progress = Callable[[float], None]
"""Told the fraction of the work that is done."""

HAS_BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
"""Whether the CPU multiplies bfloat16 itself; elsewhere it is emulated, and slower than float32."""
CURVE_POINTS = 40
_EXAM_SEED = 1 << 60
_JUDGED_AT_ONCE = 8192
"""Tokens: their logits over 2,048 tokens take 64 MB."""


@dataclass(frozen=True)
class Fit:
    """What a training was like. ``curve`` holds (tokens so far, mean loss in nats since the point before)."""

    tokens: int
    seconds: float
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TextResult:
    """A decoder trained on text. ``curve`` holds (tokens so far, bits a byte of the training text)."""

    parameters: int
    tokens: int
    seconds: float
    bits_per_byte: float
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TaskResult:
    """A decoder trained on tasks, and its share of right answers in each exam.

    ``state`` is the bytes of state of one sequence by its length, for the lengths of the exams and twice the longest.
    """

    parameters: int
    tokens: int
    seconds: float
    points: tuple[tuple[Exam, float], ...]
    state: dict[int, int]


def text(layer: Layer, setup: TextSetup, corpus: Corpus, *, seed: int, progress: Progress) -> TextResult:
    """Train a decoder with ``layer`` on ``corpus`` and judge it on the part held out."""
    model = build(layer, setup.shape, corpus.vocab, seed)
    stages = setup.training.stages
    batches = chain.from_iterable(
        islice(corpus.batches(stage.rows, stage.length, _stream(seed, i)), stage.steps)
        for i, stage in enumerate(stages)
    )
    fitted = fit(model, batches, setup.training, progress=progress)
    bits, _ = judge(model, corpus.exam(stages[-1].length))
    curve = tuple((tokens, corpus.bits_per_byte(loss)) for tokens, loss in fitted.curve)
    return TextResult(
        parameters(model), fitted.tokens, fitted.seconds, bits / (math.log(2) * corpus.validation_bytes), curve
    )


def task(layer: Layer, setup: TaskSetup, *, seed: int, progress: Progress) -> TaskResult:
    """Train a decoder with ``layer`` on all tasks at once and examine it."""
    model = build(layer, setup.shape, tasks.VOCABULARY, seed)
    batches = chain.from_iterable(
        islice(tasks.lessons(stage.rows, stage.length, stage.pairs, _stream(seed, i)), stage.steps)
        for i, stage in enumerate(setup.training.stages)
    )
    fitted = fit(model, batches, setup.training, progress=progress)
    points = []
    for exam in setup.exams:
        _, right = judge(model, exam.batch(torch.Generator().manual_seed(_EXAM_SEED), setup.rows))
        points.append((exam, right))
    lengths = sorted({exam.length for exam in setup.exams})
    state = {length: model.state(1, length).nbytes for length in (*lengths, 2 * lengths[-1])}
    return TaskResult(parameters(model), fitted.tokens, fitted.seconds, tuple(points), state)


def build(layer: Layer, shape: Shape, vocab: int, seed: int) -> Decoder:
    """A decoder with ``layer``, with as many parameters as the one with multi-head attention."""

    def mixer(make: Layer) -> Callable[[int], nn.Module]:
        return lambda index: make(
            LayerPlace(shape.width, shape.heads, shape.window, index, shape.layers, shape.qk_norm)
        )

    softmax = registry.get("softmax")
    config = DecoderConfig(vocab, shape.width, shape.layers, shape.hidden)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        mha = Decoder(config, mixer(lambda place: softmax.layer(softmax.preset("mha").configure(place))))
        config = match_parameters(config, mixer(layer), parameters(mha))
        torch.manual_seed(seed)
        return Decoder(config, mixer(layer))


def fit(model: nn.Module, batches: Iterator[Batch], training: Training, *, progress: Progress) -> Fit:
    """Train ``model`` for ``training.steps`` batches."""
    muon, adamw = optimisers(model, training)
    curve: list[tuple[int, float]] = []
    losses: list[Tensor] = []
    tokens, start = 0, time.perf_counter()
    model.train()
    for step, batch in enumerate(batches):
        share = rate(step, training)
        for group in muon.param_groups:
            group["lr"] = training.matrix_rate * share
        for group in adamw.param_groups:
            group["lr"] = training.rate * share
        with torch.autocast("cpu", torch.bfloat16, enabled=training.bfloat16 and HAS_BFLOAT16), _unfused_norms():
            logits = model(batch.tokens)
        # Each sequence weighs the same: copying asks for most of a sequence, recall for little, and would not be heard.
        asked = (batch.targets != NOT_ASKED).sum(1).clamp(min=1)
        loss = (_losses(logits, batch.targets).sum(1) / asked).mean()
        loss.backward()
        muon.step()
        adamw.step()
        model.zero_grad()
        tokens += batch.tokens.numel()
        losses.append(loss.detach())
        if (step + 1) * CURVE_POINTS // training.steps > len(curve):
            curve.append((tokens, float(torch.stack(losses).mean())))
            losses.clear()
        progress((step + 1) / training.steps)
    return Fit(tokens, time.perf_counter() - start, tuple(curve))


@contextmanager
def _unfused_norms() -> Iterator[None]:
    """Norms keep float32 weights under autocast, and torch warns that it has no fused kernel for the mixture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


@torch.no_grad()
def judge(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """The sum of losses in nats, and the share of targets that are the model's first choice; in float32."""
    model.eval()
    nats, right = 0.0, 0
    rows = max(1, _JUDGED_AT_ONCE // batch.tokens.shape[1])
    for tokens, targets in zip(batch.tokens.split(rows), batch.targets.split(rows), strict=True):
        logits = model(tokens)
        nats += float(_losses(logits, targets).sum())
        right += int((logits.argmax(-1) == targets).sum())
    return nats, right / int((batch.targets != NOT_ASKED).sum())


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target ``(b, n)``, 0 where nothing is asked."""
    flat = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NOT_ASKED, reduction="none")
    return flat.view(targets.shape)


def rate(step: int, training: Training) -> float:
    """Share of the full rates at ``step``."""
    rising = (step + 1) / max(1.0, training.warmup * training.steps)
    falling = (training.steps - step) / (training.decay * training.steps)
    return min(1.0, rising, falling)


def optimisers(model: nn.Module, training: Training) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for linear maps, AdamW for the rest; without weight decay, as no example is seen often enough to overfit."""
    maps = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    known = {id(weight) for weight in maps}
    rest = [weight for weight in model.parameters() if id(weight) not in known]
    return (
        torch.optim.Muon(maps, lr=training.matrix_rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=training.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )


def _stream(seed: int, stage: int) -> int:
    """Each stage draws its own random numbers, and none draws those of the exams."""
    return seed + (stage << 32)
