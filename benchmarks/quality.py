"""What attnkit's attention and caches change of SmolLM2's output: perplexity, greedy text, and the bytes they take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import exp, expm1
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import attnkit.hf
from attnkit.bench.results import Line
from attnkit.parity.text import Said, written
from attnkit.testing.budgets import PROMISED, QUALITY, allowed

TEXT, PIECE = 4096, 64  # tokens whose perplexity is measured with each form of cache, and how many are read at once
# What bfloat16 changes of a token's probability is noise, many times the bound on its mean: few tokens cannot judge it.
WINDOWS, LONGER = 6, 512
GREEDY = 256
EXACT, PLAIN = "float32", "transformers"
OURS = "bf16"


class Reader:
    """One model read by Transformers as it comes (the form None), or by our attention with a form of our cache."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def cache(self, form: str | None, length: int) -> Any:
        """A new cache, and the model set to the attention beside it."""
        self.model.set_attn_implementation("sdpa" if form is None else "attnkit")
        ours: Any = attnkit.hf.Cache
        config = self.model.config
        return DynamicCache(config=config) if form is None else ours(config, dtype=form, max_length=length)

    @torch.inference_mode()
    def said(self, form: str | None, text: Tensor, piece: int) -> tuple[Tensor, int]:
        """The log-probability of each token of ``text`` ``(t,)`` but the first, and the bytes of the cache at the end.

        The text is read ``piece`` tokens at once.
        """
        held, found = self.cache(form, len(text)), []
        for start in range(0, len(text) - 1, piece):
            logits = self.model(text[None, start : start + piece], cache=held, use_cache=True).logits[0]
            asked = text[start + 1 : start + 1 + piece]
            found.append(Said.of(logits[: len(asked)], asked).chosen.double())
        return torch.cat(found), nbytes(held)

    @torch.inference_mode()
    def greedy(self, form: str | None, prompt: Tensor) -> Tensor:
        """The ``GREEDY`` tokens that follow ``prompt`` ``(t,)`` when the likeliest is always taken."""
        return written(self.model, prompt[None], GREEDY, self.cache(form, len(prompt) + GREEDY))

    @torch.inference_mode()
    def next(self, form: str | None, context: Tensor) -> Tensor:
        """The logits of what follows ``context`` ``(t,)``."""
        held = self.cache(form, len(context))
        logits: Tensor = self.model(context[None], cache=held, use_cache=True, logits_to_keep=1).logits[0, -1]
        return logits.clone()


def nbytes(cache: Any) -> int:
    """Bytes of keys and values that a cache has allocated."""
    if isinstance(cache, attnkit.hf.Cache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def perplexity(model: Any, form: str, text: Tensor, others: Sequence[Line]) -> Line:
    """The line of one form of cache; ``others`` are Transformers' own in float32 and as it comes, when they are known.

    A form holds its bound when it is that near to Transformers as it comes.
    """
    said, size = Reader(model).said(form if form in PROMISED else None, text, PIECE)
    found = exp(-said.mean().item())
    line: Line = {"kind": "perplexity", "id": "K14", "form": form, "perplexity": found}
    line |= {"bytes": size, "tokens": len(text)}
    for other in others:
        line[f"off_{other['form']}"] = abs(found / other["perplexity"] - 1)
    if form in PROMISED:
        line |= {"bound": PROMISED[form], "holds": line[f"off_{PLAIN}"] <= PROMISED[form]}
    return line


def unchanged(model: Any, exact: Any, text: Tensor) -> Line:
    """The line of our attention and cache in bfloat16, beside Transformers' on the same tokens.

    They hold the bound when their perplexity is that near to Transformers as it comes. How far each is from float32
    stands beside it, for bfloat16 moves both; ``error_...`` is the standard error of a distance, by tokens.
    """
    readers = {EXACT: (exact, None), PLAIN: (model, None), OURS: (model, OURS)}
    parts: dict[str, list[Tensor]] = {name: [] for name in readers}
    for window in text.split(TEXT)[:WINDOWS]:
        for name, (reader, form) in readers.items():
            said, size = Reader(reader).said(form, window, LONGER)
            parts[name].append(said)
    said = {name: torch.cat(found) for name, found in parts.items()}
    line: Line = {"kind": "perplexity", "id": "K14", "form": OURS, "bytes": size, "tokens": TEXT * WINDOWS}
    line |= {"perplexity": exp(-said[OURS].mean().item())}
    for one, other in ((OURS, PLAIN), (OURS, EXACT), (PLAIN, EXACT)):
        off = said[other] - said[one]
        name = other if one == OURS else f"{other}_of_{one}"
        line[f"off_{name}"] = abs(expm1(off.mean().item()))
        line[f"error_{name}"] = (off.std() / len(off) ** 0.5).item()
    bound = QUALITY[torch.bfloat16].perplexity
    return line | {"bound": bound, "holds": line[f"off_{PLAIN}"] <= bound}


def greedy(model: Any, exact: Any, prompt: Tensor) -> Line:
    """Whether ours writes the same text as Transformers, or where it parts and how near the two logits are there.

    ``exact`` is the model in float32, whose logits stand for the truth: bfloat16 rounds a thousand times as coarsely.
    """
    reader = Reader(model)
    start = time.perf_counter()
    want, got = (reader.greedy(form, prompt) for form in (None, OURS))
    differ = (want != got).nonzero()
    line: Line = {"kind": "greedy", "id": "K14", "prompt": len(prompt), "tokens": GREEDY, "seconds": 0.0}
    if not len(differ):
        line |= {"first": None, "gap": None, "allowed": None, "holds": True}
    else:
        place = int(differ[0])
        context = torch.cat([prompt, want[:place]])
        gold, naive = Reader(exact).next("fp32", context), reader.next(None, context)
        gap = abs(gold[want[place]] - gold[got[place]]).item()
        depth = model.config.num_hidden_layers
        bound = 2 * allowed(gold.double(), naive, torch.bfloat16, depth=depth)
        line |= {"first": place, "gap": gap, "allowed": bound, "holds": gap <= bound}
    return line | {"seconds": time.perf_counter() - start}
