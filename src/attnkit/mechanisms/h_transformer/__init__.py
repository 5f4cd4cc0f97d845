"""H-Transformer-1D: near tokens one by one, far ones as averages over blocks that double with the distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import causal as causal_mask
from attnkit.mechanisms.h_transformer import chunk
from attnkit.mechanisms.h_transformer.blocks import levels
from attnkit.mechanisms.h_transformer.reference import forward as reference
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import SummaryState

__all__ = [
    "SPEC",
    "HTransformerAttention",
    "HTransformerConfig",
    "h_transformer_attention",
    "h_transformer_attention_step",
]


def h_transformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 16,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention whose far logits are those of averages: ``o_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij)``.

    Positions ``i`` and ``j`` meet on the smallest level ``l >= 0`` on which they lie in one pair of blocks of
    ``block 2^l`` tokens, ``i // (2 block 2^l) == j // (2 block 2^l)``. There ``s_ij`` is the product of the means of
    their groups of ``2^l`` tokens. Causal queries are not averaged, because their group has later tokens.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16: the last ``m`` of the ``n`` positions; all, unless causal.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    block: tokens of a block of level 0, where nothing is averaged; up to ``2 block`` tokens it is softmax attention.
    causal: whether a position sees only those up to its own.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    lengths: (b,) integers, true lengths of the sequences, not causal; None where all have ``n``. What lies behind them
        is never read, is in no mean, and its rows are 0.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Zhu and Soricut 2021, arXiv 2107.11906; the causal form is settled here.
    """
    checked = call(q, k, v, block=block, causal=causal, scale=scale, lengths=lengths)
    result: Tensor = run(SPEC, checked, backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 16,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``h_transformer_attention``; return them by name, as every backend gets them."""
    where = "h_transformer_attention"
    sizes = shapes.check_call(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"))
    m, n = sizes["m"], sizes["n"]
    shapes.check_last(where, m, n)
    if block < 1:
        raise ValueError(f"{where}: block is {block}, expected at least 1")
    if not causal and m != n:
        raise ValueError(
            f"{where}: got {m} queries and {n} keys, expected as many when not causal: queries are averaged"
        )
    if lengths is not None:
        if causal:
            raise ValueError(f"{where}: got lengths and causal True, expected one: no token sees the padding after it")
        shapes.check(where, q=(q, "b h m d"), lengths=(lengths, "b"))
        shapes.check_device(where, q=q, lengths=lengths)
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise TypeError(f"{where}: lengths has dtype {lengths.dtype}, expected integers")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return {"q": q, "k": k, "v": v, "block": block, "causal": causal, "scale": scale, "lengths": lengths}


def h_transformer_attention_step(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, *, scale: float | None = None
) -> Tensor:
    """The causal form for the newest ``m`` tokens, which see the same sums: over what ``SummaryState.append`` returns.

    Parameters
    ----------
    q: (b, h, m, d). scale: as in ``h_transformer_attention``.
    k: (b, g, n, d), v: (b, g, n, e): means, then single tokens, the new ones last.
    counts: (n,), floating: of how many tokens each key is the mean.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    """
    where = "h_transformer_attention_step"
    sizes = shapes.check(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"), counts=(counts, "n"))
    shapes.check_last(where, sizes["m"], sizes["n"])
    o: Tensor = softmax_attention(q, k, v, mask=causal_mask(), scale=scale, bias=counts.log()[None, None, None])
    return o


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``h_transformer_attention``: causal, with blocks of 1 to 4 tokens where there are few of them."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e))
    )
    return {"q": q, "k": k, "v": v, "block": 16 if s.n >= 256 else 1 + seed % 4}


def cost(sizes: Sizes, *, block: int = 16, causal: bool = True, itemsize: int = 4) -> Cost:
    """Cost of one call, of the pairs that have to be looked at; the causal state depends on ``n`` by its logarithm."""
    s, above = sizes, levels(sizes.n, block) - 1
    pairs = _causal_pairs(s.n, block) - _causal_pairs(s.n - s.m, block) if causal else _all_pairs(s.n, block)
    channels, sums = s.g * (s.d + s.e), max(4, itemsize)
    return Cost(
        flops=2 * s.b * s.h * pairs * (s.d + s.e),
        bytes=s.b * (s.h * s.m * (s.d + s.e) + s.n * channels) * itemsize,
        state_bytes_per_token=0,
        state_bytes_fixed=(min(2 * block, s.n) * itemsize + above * block * sums) * channels if causal else 0,
    )


def _causal_pairs(n: int, block: int) -> int:
    """Keys, single or summed, that the first ``n`` positions look at."""
    whole, rest = divmod(n, 2 * block)
    pairs = whole * block * (2 * block + 1) + rest * (rest + 1) // 2
    for level in range(1, levels(n, block)):
        whole, rest = divmod(n, 2 * block << level)
        pairs += ((block << level) * whole + max(0, rest - (block << level))) * block
    return pairs


def _all_pairs(n: int, block: int) -> int:
    """Pairs of tokens on level 0, and of groups on the others, where each pair of blocks looks both ways."""
    whole, rest = divmod(n, 2 * block)
    pairs = whole * (2 * block) ** 2 + rest**2
    for level in range(1, levels(n, block)):
        whole, rest = divmod(-(-n >> level), 2 * block)
        pairs += 2 * (whole * block**2 + block * max(0, rest - block))
    return pairs


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.h_transformer.layer import HTransformerAttention, HTransformerConfig  # noqa: E402


def _h1d(place: LayerPlace) -> HTransformerConfig:
    rotary = Rotary(place.width // place.heads)
    # A token sees up to two blocks one by one: as many as a window layer at the same place.
    return HTransformerConfig(
        place.width, place.heads, block=max(1, place.window // 2), rotary=rotary, qk_norm=place.qk_norm
    )


SPEC = Mechanism(
    name="h_transformer",
    title="H-Transformer-1D attention",
    equation="o = softmax(s) v, s_ij = q_i mean(k of j's 2^l tokens) * scale, l the level on which i and j meet",
    papers=("arXiv 2107.11906",),
    call=call,
    function=h_transformer_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True),
    cost=cost,
    layer=HTransformerAttention,
    state=SummaryState,
    presets=(Preset("h1d", "H-Transformer-1D", "arXiv 2107.11906", _h1d),),
)
