"""HAN pooling: words weighted by a learned idea of what matters, into sentences; then sentences into documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.mechanisms.han import chunk
from attnkit.mechanisms.han.reference import forward as reference
from attnkit.spec import Backend, Cost, Laws, Mechanism, Sizes

__all__ = ["SPEC", "HanAttention", "HanConfig", "HanDocument", "han_attention"]


def han_attention(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    vector: Tensor,
    ids: Tensor,
    *,
    sentences: int,
    backend: str | None = None,
) -> Tensor:
    """Pool packed words into sentences: ``softmax_j(vector . tanh(weight x_j + offset))`` of each sentence's words.

    Parameters
    ----------
    x: (b, n, x), float64, float32, bfloat16 or float16: states of the words of a document, all sentences in a row.
    weight: (d, x), offset: (d,), vector: (d,), same dtype and device; the paper's ``W_w``, ``b_w``, ``u_w``.
    ids: (b, n) integers: the sentence of each word, 0 to ``sentences - 1``, in any order. Words with another number,
        such as -1 for padding, belong to none and are never read.
    sentences: how many there are; one without words gives 0.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, sentences, x) in x's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Yang et al. 2016, "Hierarchical Attention Networks for Document Classification".
    """
    result: Tensor = run(SPEC, call(x, weight, offset, vector, ids, sentences=sentences), backend)
    return result


def call(x: Tensor, weight: Tensor, offset: Tensor, vector: Tensor, ids: Tensor, *, sentences: int) -> dict[str, Any]:
    """Check the arguments of ``han_attention``; return them by name, as every backend gets them."""
    where = "han_attention"
    given = {"x": x, "weight": weight, "offset": offset, "vector": vector}
    patterns = {"x": "b n x", "weight": "d x", "offset": "d", "vector": "d"}
    shapes.check(where, **{name: (tensor, patterns[name]) for name, tensor in given.items()}, ids=(ids, "b n"))
    shapes.check_same(where, **given)
    shapes.check_device(where, x=x, ids=ids)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{where}: ids has dtype {ids.dtype}, expected integers, the sentence of each word")
    if sentences < 0:
        raise ValueError(f"{where}: sentences is {sentences}, expected at least 0")
    return {**given, "ids": ids, "sentences": sentences}


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``han_attention``: ``n`` words of ``d`` numbers, hidden size ``e``, a sentence for each two ``m``.

    Some sentences have no words and some words no sentence.
    """
    s = sizes or Sizes(b=2, h=1, g=1, m=37, n=37, d=16, e=8)
    sentences = s.m // 2 + 1
    generator = torch.Generator().manual_seed(seed)
    sizes_of = {"x": (s.b, s.n, s.d), "weight": (s.e, s.d), "offset": (s.e,), "vector": (s.e,)}
    scales = {"x": 1.0, "weight": s.d**-0.5, "offset": 0.3, "vector": 2 * s.e**-0.5}
    drawn: dict[str, Any] = {
        name: (scales[name] * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
        for name, shape in sizes_of.items()
    }
    ids = torch.randint(sentences, (s.b, s.n), generator=generator).sort().values
    ids[torch.rand(s.b, s.n, generator=generator) < 0.1] = -1
    return {**drawn, "ids": ids.to(device), "sentences": sentences}


def cost(sizes: Sizes, *, itemsize: int = 4) -> Cost:
    """Cost of pooling ``n`` words of ``d`` numbers with hidden size ``e`` into ``m // 2 + 1`` sentences; no state."""
    s = sizes
    return Cost(
        flops=2 * s.b * s.n * (s.d * s.e + s.e + s.d),
        bytes=s.b * (s.n + s.m // 2 + 1) * s.d * itemsize,
        state_bytes_per_token=0,
        state_bytes_fixed=0,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.han.layer import HanAttention, HanConfig, HanDocument  # noqa: E402

SPEC = Mechanism(
    name="han",
    title="HAN pooling",
    equation="o_s = sum over words j of sentence s of softmax_j(vector . tanh(weight x_j + offset)) x_j",
    papers=("Yang et al. 2016, NAACL, N16-1174",),
    call=call,
    function=han_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk), Backend("reference", _reference)),
    # It pools: a sentence sees all its words, so there is no causal form, no state, no row to compare, and no heads.
    laws=Laws(causal=False, stateful=False, step_equals_prefill=False, length_invariant=True, separate_heads=False),
    cost=cost,
    layer=HanAttention,
)
