"""Checks of what a reader of the output would notice: probabilities, perplexity, and the text that is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from typing import Any

import torch
from torch import Tensor

from attnkit.hf.names import as_cache
from attnkit.parity.caches import PLAIN, cache
from attnkit.parity.record import Check, Finding, Lane, Verdict
from attnkit.parity.subject import Subject, layers
from attnkit.testing.budgets import QUALITY, Quality, allowed

PIECE = 64
"""Tokens that are read at once where there is a cache."""


@dataclass(frozen=True, eq=False)
class Said:
    """What a model thinks of a text: the log-probabilities ``(t, vocabulary)`` of every next token, and those asked."""

    logprobs: Tensor
    asked: Tensor

    @staticmethod
    def of(logits: Tensor, asked: Tensor) -> Said:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return Said(torch.log_softmax(wide, -1).float(), asked)

    @property
    def chosen(self) -> Tensor:
        """The log-probability of each token that really follows."""
        return self.logprobs.gather(1, self.asked[:, None])[:, 0]

    def off(self, gold: Said) -> Tensor:
        """By how much each of those is off."""
        return (self.chosen.double() - gold.chosen.double()).abs()

    @property
    def perplexity(self) -> float:
        return exp(-self.chosen.double().mean().item())


def said(model: Any, text: Tensor, cuts: Sequence[int] = (), name: str | None = None) -> Said:
    """What ``model`` says of ``text`` ``(t,)``, read whole or, with a cache, in pieces that end at ``cuts``."""
    options = {} if name is None else as_cache(model, cache(name, model.config, len(text) + 1))
    logits = []
    with torch.no_grad():
        for start, end in pairwise((0, *(cuts or (len(text),)))):
            piece = text[None, start:end]
            logits.append(model(piece, use_cache=name is not None, **options).logits[0])
    return Said.of(torch.cat(logits)[:-1], text[1:])


def compared(got: Said, gold: Said, bounds: Quality) -> Finding:
    """Kullback-Leibler divergence, agreement on the likeliest token, and perplexity, each beside its bound."""
    p, q = gold.logprobs.double(), got.logprobs.double()
    divergence = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    off = got.off(gold)
    top = p.gather(1, q.argmax(-1, keepdim=True))[:, 0]
    missed = p.amax(-1) - top  # how much likelier the right token is than the one that was likeliest here
    figures = {
        "KL, mean": divergence.mean().item(),
        "KL, largest": divergence.max().item(),
        "top-1 agreement": (missed == 0).double().mean().item(),
        "log-probability off, mean": off.mean().item(),
        "log-probability off, largest": off.max().item(),
        "perplexity": got.perplexity,
        "perplexity expected": gold.perplexity,
        "perplexity off": abs(got.perplexity / gold.perplexity - 1),
    }
    shares = {
        "log-probabilities are off on average by": (figures["log-probability off, mean"], bounds.mean),
        "a log-probability is off by": (figures["log-probability off, largest"], bounds.largest),
        "another token is likeliest, which is less likely by": (missed.max().item(), 2 * bounds.largest),
        "perplexity is off by a share of": (figures["perplexity off"], bounds.perplexity),
    }
    worst = max(shares, key=lambda name: shares[name][0] / shares[name][1])
    found, bound = shares[worst]
    wrong = not found <= bound
    says = (
        f"KL {figures['KL, mean']:.2g}, top-1 agreement {figures['top-1 agreement']:.2%}, perplexity "
        f"{got.perplexity:.6g} for {gold.perplexity:.6g}"
    )
    if wrong:
        says = f"{worst} {found:.3g}, allowed {bound:.3g}; {says}"
    return Finding(Verdict.CHANGED if wrong else Verdict.ROUNDING, says, share=found / bound, figures=figures)


def bounds(subject: Subject, name: str, gold: Said, plain: Callable[[str], Said]) -> Quality:
    """What the cache ``name`` may change; ``plain`` says what the model with another cache says."""
    rounding = QUALITY[subject.dtype]
    return rounding.beside(plain(PLAIN[name]).off(gold), name) if name in PLAIN else rounding


def _text(subject: Subject, lane: Lane) -> Finding:
    gold = subject.true("text", lambda model: said(model, subject.text))
    got = subject.tried(lane.backend, "text", lambda model: said(model, subject.text))
    return compared(got, gold, QUALITY[subject.dtype])


def _cached_text(subject: Subject, lane: Lane) -> Finding:
    t, name, key = len(subject.text), lane.cache, "cached text"
    assert name is not None
    cuts = [*range(PIECE, t, PIECE), t] if t > 2 * PIECE else [t // 3, 2 * t // 3, t]

    def plain(other: str) -> Said:
        return subject.plain(f"{key}, {other}", lambda model: said(model, subject.text, cuts, other))

    gold = subject.true(key, lambda model: said(model, subject.text, cuts, "dynamic"))
    got = subject.tried(lane.backend, f"{key}, {name}", lambda model: said(model, subject.text, cuts, name))
    return compared(got, gold, bounds(subject, name, gold, plain))


def _greedy(subject: Subject, lane: Lane) -> Finding:
    """The same text is written, or the first token that differs was a draw within the budget."""
    prompt, name = subject.text[None, : subject.prompt], lane.cache
    length = prompt.shape[1] + subject.new

    def text(model: Any, name: str) -> Tensor:
        return written(model, prompt, subject.new, cache(name, model.config, length))

    assert name is not None
    want = subject.plain("greedy", lambda model: text(model, "dynamic"))
    got = subject.tried(lane.backend, f"greedy, {name}", lambda model: text(model, name))
    differ = (got != want).nonzero()
    if not len(differ):
        return Finding(Verdict.SAME, f"the same {subject.new} tokens", figures={"tokens": subject.new})
    place = int(differ[0])
    other = PLAIN.get(name, "dynamic")
    gold = subject.true(f"greedy {place}", lambda model: _next(model, prompt, want[:place], "dynamic"))
    naive = subject.plain(f"greedy {place}, {other}", lambda model: _next(model, prompt, want[:place], other))
    depth = len(layers(subject.model)) or 1
    gap = abs(gold[want[place]].item() - gold[got[place]].item())
    bound = 2 * allowed(gold.double(), naive, subject.dtype, depth=depth)
    draw = gap <= bound
    says = (
        f"token {place} is the first that differs: the logits of the two are {gap:.2g} apart, and rounding may move "
        f"them by {bound:.2g}"
    )
    figures = {"first that differs": place, "gap": gap, "allowed": bound}
    return Finding(Verdict.ROUNDING if draw else Verdict.CHANGED, says, share=gap / bound, figures=figures)


def written(model: Any, prompt: Tensor, new: int, held: Any) -> Tensor:
    """The ``new`` tokens that follow ``prompt`` ``(1, t)``, read into the empty cache ``held``; the likeliest each."""
    tokens: list[Tensor] = []
    with torch.no_grad():
        logits = model(prompt, use_cache=True, **as_cache(model, held)).logits[:, -1]
        for _ in range(new - 1):
            tokens.append(logits.argmax(-1, keepdim=True))
            logits = model(tokens[-1], use_cache=True, **as_cache(model, held)).logits[:, -1]
    return torch.cat([*tokens, logits.argmax(-1, keepdim=True)], 1)[0]


def _next(model: Any, prompt: Tensor, new: Tensor, name: str) -> Tensor:
    """The logits of what follows ``prompt`` ``(1, t)`` and ``new`` ``(m,)``, which are read one by one."""
    held = cache(name, model.config, prompt.shape[1] + len(new))
    with torch.no_grad():
        for piece in (prompt, *new[None].split(1, 1)):
            logits: Tensor = model(piece, cache=held, use_cache=True).logits[0, -1]
    return logits.clone()


CHECKS = (
    Check("text", "KL, top-1 agreement and perplexity on text", _text),
    Check("text through the cache", "the same on text read in pieces", _cached_text, cached=True),
    Check("greedy", "the first token that differs when the likeliest is always taken", _greedy, cached=True),
)
