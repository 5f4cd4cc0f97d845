"""What a model takes on a processor: bytes, requests that fit, and times that no program can be faster than."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnkit.advise.hardware import Hardware
from attnkit.advise.lengths import Lengths
from attnkit.advise.model import Model

# Tokens of a prompt that are read at once; engines cut longer prompts, so that activations stay bounded.
PREFILL_TOKENS = 8192
MOST_REQUESTS = 1 << 20
TRAINED_BYTES = 16
"""Of a trained weight: itself and its gradient in 2 bytes each, a copy and two moments in 4 (ZeRO, 1910.02054)."""
LIVE = 34
"""Bytes of a token, in widths, that a layer holds for its gradient (Korthikanti et al. 2022, 2205.05198)."""
PASSES = 4
"""Of the arithmetic of reading: forward, forward again, and a backward pass of twice as much."""


@dataclass(frozen=True)
class Time:
    """Seconds, and what they are spent on: the longest part and what bounds it."""

    seconds: float
    part: str
    bound: str


@dataclass(frozen=True)
class Column:
    """What requests of one length take, if all of them are of that length."""

    name: str
    tokens: int
    cache: int
    reserved: int
    fit: int
    prefill: Time
    decode: Time


@dataclass(frozen=True)
class Load:
    """What is asked of a processor: lengths, requests at once, tokens of a source, tokens that all requests share."""

    lengths: Lengths
    concurrency: int
    source: int = 0
    shared: int = 0
    train: bool = False


@dataclass(frozen=True)
class Estimate:
    """The bytes and times of one model in one form on one processor."""

    weights: int
    activations: int
    usable: int
    free: int
    token: int
    needed: int
    columns: tuple[Column, ...]

    def column(self, name: str) -> Column:
        """The column called ``p99``."""
        return next(column for column in self.columns if column.name == name)


def estimate(model: Model, hardware: Hardware, load: Load, page: int | None, *, table: bool = False) -> Estimate:
    """Bytes and times of ``model``; ``page`` is the page of its cache, None for buffers as long as the worst case.

    In training ``table`` says that all scores of a layer are held at once.

    What has to fit is ``concurrency`` requests of the 99th percentile on pages, and of the worst case in buffers, which
    are taken before a request's length is known.
    """
    if load.train:
        return _training(model, hardware, load, table)
    columns = load.lengths.columns
    worst = _reserved(model, columns["worst"], None, load.source)
    usable = int(hardware.memory * hardware.usable)
    activations = _activations(model, load, columns["worst"])
    free = usable - model.weight_bytes - activations
    found = []
    for name, tokens in columns.items():
        reserved = worst if page is None else _reserved(model, tokens, page, load.source)
        found.append(
            Column(
                name=name,
                tokens=tokens,
                cache=model.state_bytes(tokens, load.source),
                reserved=reserved,
                fit=min(MOST_REQUESTS, max(0, free // max(1, reserved))) if free > 0 else 0,
                prefill=prefill(model, hardware, tokens, load.source, load.shared),
                decode=decode(model, hardware, tokens, load.concurrency, load.source),
            )
        )
    p99 = next(column for column in found if column.name == "p99")
    once = _reserved(model, min(load.shared, p99.tokens), page, load.source) if load.shared else 0
    needed = once + load.concurrency * max(0, p99.reserved - once)
    return Estimate(model.weight_bytes, activations, usable, free, model.token_bytes(load.source), needed, tuple(found))


def _training(model: Model, hardware: Hardware, load: Load, table: bool) -> Estimate:
    """What training takes: weights with gradients and Adam, and the layers' inputs, each layer computed once more."""
    usable = int(hardware.memory * hardware.usable)
    weights = model.weights * TRAINED_BYTES
    free = usable - weights
    found = []
    for name, tokens in load.lengths.columns.items():
        held = len(model.layers) * tokens * model.width * model.itemsize + tokens * model.vocabulary * 4
        layer = tokens * LIVE * model.width
        # Scores and their gradients, of the layer at work.
        scores = max((m.heads for m in model.mixers if m.mechanism == "softmax"), default=0) * tokens**2
        taken = held + layer + (2 * scores * model.itemsize if table else 0)
        once = prefill(model, hardware, tokens, load.source)
        step = Time(load.concurrency * PASSES * once.seconds, once.part, once.bound)
        fit = min(MOST_REQUESTS, max(0, free // taken))
        found.append(Column(name, tokens, taken, taken, fit, step, step))
    needed = load.concurrency * next(column.reserved for column in found if column.name == "p99")
    return Estimate(weights, 0, usable, free, 0, needed, tuple(found))


def _reserved(model: Model, tokens: int, page: int | None, source: int) -> int:
    """Bytes taken for a request; what does not grow has no pages, and rounding it up changes nothing."""
    whole = tokens if page is None else -(-tokens // page) * page
    return model.state_bytes(whole, source)


def _activations(model: Model, load: Load, longest: int) -> int:
    """Bytes of numbers on their way through a layer, and of logits: at most a prompt's part and every request's row."""
    rows = min(PREFILL_TOKENS, longest) + load.concurrency
    active = max((layer.active for layer in model.layers), default=0)
    inner = max(model.hidden, active // max(1, 8 * model.width))
    return rows * (4 * model.width + 2 * inner) * model.itemsize + load.concurrency * model.vocabulary * 4


def prefill(model: Model, hardware: Hardware, tokens: int, source: int = 0, shared: int = 0) -> Time:
    """The time until a prompt of ``tokens`` has been read and the first token is there; ``shared`` ones were before."""
    new = max(1, tokens - shared)
    body = sum(layer.active for layer in model.layers)
    ends = 2 * (model.embedding if model.tied else model.head)
    encoder = sum(layer.active for layer in model.encoder)
    flops = 2 * new * body + ends + 2 * source * encoder
    parts = {"weights": (flops, _read(model, new)), "attention": model.attention(new, tokens, source)}
    return _time(hardware, model, parts)


def decode(model: Model, hardware: Hardware, tokens: int, requests: int, source: int = 0) -> Time:
    """The time of one step that gives each of ``requests`` sequences of ``tokens`` its next token."""
    flops, moved = model.attention(1, tokens, source)
    parts = {
        "weights": (2 * requests * model.active, _read(model, requests)),
        "attention": (requests * flops, requests * moved),
    }
    return _time(hardware, model, parts)


def _read(model: Model, tokens: int) -> int:
    """Bytes of weights that ``tokens`` tokens need, each read once."""
    body = sum(layer.touched(tokens) for layer in model.layers)
    return int((body + (model.embedding if model.tied else model.head)) * model.weight_bits / 8)


def _time(hardware: Hardware, model: Model, parts: Mapping[str, tuple[float, float]]) -> Time:
    # Weights of 8 bits and fewer are multiplied as such where the processor can.
    narrow = model.weight_bits <= 8 and "float8" in hardware.rates
    rates = {"weights": hardware.rate("float8" if narrow else model.dtype), "attention": hardware.rate(model.dtype)}
    total, longest, answer = 0.0, -1.0, ("weights", "memory")
    for name, (flops, moved) in parts.items():
        arithmetic, memory = flops / rates[name], moved / hardware.bandwidth
        total += max(arithmetic, memory)
        if max(arithmetic, memory) > longest:
            longest = max(arithmetic, memory)
            answer = (name, "arithmetic" if arithmetic > memory else "memory")
    return Time(total, *answer)
