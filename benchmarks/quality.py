"""What attnkit's attention and caches change of SmolLM2's output: perplexity, greedy text, and the bytes they take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import attnkit.hf
from attnkit.bench.results import Line
from attnkit.parity.text import Said, written
from attnkit.testing.budgets import PROMISED, QUALITY, allowed

TEXT, PIECE = 4096, 64  # tokens whose perplexity is measured, and how many are read at once
GREEDY = 256
EXACT, PLAIN = "float32", "transformers"
FORMS = ("bf16", *PROMISED)
BOUNDS = {"bf16": QUALITY[torch.bfloat16].perplexity, **PROMISED}


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
    def perplexity(self, form: str | None, text: Tensor) -> Line:
        """Of ``text`` ``(t,)``, read in pieces through the cache, and what the cache takes then."""
        held, logits = self.cache(form, len(text)), []
        for piece in text[None].split(PIECE, 1):
            logits.append(self.model(piece, cache=held, use_cache=True).logits[0])
        said = Said.of(torch.cat(logits)[:-1], text[1:])
        return {"perplexity": said.perplexity, "bytes": nbytes(held), "tokens": len(text)}

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

    A form holds its bound when it is that near to Transformers as it comes. How far both are from float32 stands beside
    it: bfloat16 moves Transformers' own perplexity too.
    """
    found = Reader(model).perplexity(form if form in FORMS else None, text)
    line = {"kind": "perplexity", "id": "K14", "form": form, **found}
    for other in others:
        line[f"off_{other['form']}"] = abs(found["perplexity"] / other["perplexity"] - 1)
    if form in FORMS:
        line |= {"bound": BOUNDS[form], "holds": line[f"off_{PLAIN}"] <= BOUNDS[form]}
    return line


def greedy(model: Any, exact: Any, prompt: Tensor) -> Line:
    """Whether ours writes the same text as Transformers, or where it parts and how near the two logits are there.

    ``exact`` is the model in float32, whose logits stand for the truth: bfloat16 rounds a thousand times as coarsely.
    """
    reader = Reader(model)
    start = time.perf_counter()
    want, got = (reader.greedy(form, prompt) for form in (None, "bf16"))
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
