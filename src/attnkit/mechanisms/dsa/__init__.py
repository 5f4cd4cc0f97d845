"""DeepSeek sparse attention (DSA): latent attention over the few keys that a cheap, learned indexer chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.costs import dsa as cost
from attnkit.dispatch import run
from attnkit.mechanisms.dsa import chunk, cpu
from attnkit.mechanisms.dsa.losses import index_loss
from attnkit.mechanisms.dsa.reference import forward as reference
from attnkit.mechanisms.mla import SPEC as MLA
from attnkit.positions import Rotary
from attnkit.spec import Backend, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import LatentState

__all__ = ["SPEC", "DSAConfig", "DSAttention", "dsa_attention", "dsa_sparse_loss", "dsa_warmup_loss"]


def dsa_attention(
    q: Tensor,
    latent: Tensor,
    kv_b: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    *,
    top: int,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal latent attention of each query to the ``top`` keys of the largest ``I = sum_j w_j relu(q^I_j . k^I)``.

    All heads share the choice. Of equal scores the keys with the lowest index are chosen; a query with no more than
    ``top`` keys sees them all. The queries are the last ``m`` of the ``n`` positions. The gradient of the three index
    tensors is 0, as a choice is constant between jumps; ``dsa_warmup_loss`` and ``dsa_sparse_loss`` are to train them.

    Parameters
    ----------
    q: (b, h, m, d), latent: (b, g, n, c + r) and kv_b: (h, d - r + e, c), as in ``mla_attention``; ``m`` is at most
        ``n``.
    index_q: (b, j, m, i), any floating dtype: ``j`` small queries a token. Scores are float32 at least.
    index_k: (b, p, n, i), any floating dtype; ``p`` divides ``j`` and is 1 in DeepSeek's models.
    index_w: (b, j, m), any floating dtype: weights of the index heads, of either sign, with every constant factor.
    top: keys a query keeps.
    scale: multiplies ``q k^T``, not the index scores; ``d ** -0.5`` when None.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: DeepSeek-V3.2, arXiv 2512.02556.
    """
    checked = call(q, latent, kv_b, index_q, index_k, index_w, top=top, scale=scale)
    result: Tensor = run(SPEC, checked, backend)
    return result


def call(
    q: Tensor,
    latent: Tensor,
    kv_b: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    *,
    top: int,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``dsa_attention``; return them by name, as every backend gets them."""
    given = _checked("dsa_attention", q, latent, kv_b, index_q, index_k, index_w, scale)
    return {**given, "top": _checked_top("dsa_attention", top)}


def dsa_warmup_loss(
    q: Tensor,
    latent: Tensor,
    kv_b: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """How far the indexer is from attention to all keys: the mean over queries of ``KL(p || softmax(I))``.

    ``p`` is the mean of all heads' weights. For the first stage of training, in which the rest of a model stands still:
    only the index tensors get a gradient. Arguments are those of ``dsa_attention``; returns a scalar, float32 at least.
    """
    return index_loss(**_checked("dsa_warmup_loss", q, latent, kv_b, index_q, index_k, index_w, scale), top=None)


def dsa_sparse_loss(
    q: Tensor,
    latent: Tensor,
    kv_b: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    *,
    top: int,
    scale: float | None = None,
) -> Tensor:
    """The same among the ``top`` keys that each query chooses, whose weights sum to 1: for sparse training.

    Arguments are those of ``dsa_attention``; only the index tensors get a gradient.
    """
    given = _checked("dsa_sparse_loss", q, latent, kv_b, index_q, index_k, index_w, scale)
    return index_loss(**given, top=_checked_top("dsa_sparse_loss", top))


def _checked(
    where: str,
    q: Tensor,
    latent: Tensor,
    kv_b: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    scale: float | None,
) -> dict[str, Any]:
    given = MLA.call(q, latent, kv_b, scale=scale)
    del given["mask"]
    index = {"index_q": index_q, "index_k": index_k, "index_w": index_w}
    patterns = ("b j m i", "b p n i", "b j m")
    sizes = shapes.check(where, q=(q, "b h m d"), latent=(latent, "b g n joined"), **_paired(index, patterns))
    shapes.check_device(where, q=q, **index)
    shapes.check_last(where, sizes["m"], sizes["n"])
    shapes.check_floating(where, **index)
    if sizes["p"] == 0 or sizes["j"] % sizes["p"]:
        raise ValueError(
            f"{where}: got {sizes['j']} index heads and {sizes['p']} index keys a token, expected keys that divide them"
        )
    return given | index


def _paired(tensors: dict[str, Tensor], patterns: tuple[str, ...]) -> dict[str, tuple[Tensor, str]]:
    return {name: (x, pattern) for (name, x), pattern in zip(tensors.items(), patterns, strict=True)}


def _checked_top(where: str, top: int) -> int:
    if isinstance(top, bool) or not isinstance(top, int):
        raise TypeError(f"{where}: top is a {type(top).__name__} ({top!r}), expected an integer")
    if top < 1:
        raise ValueError(f"{where}: top is {top}, expected at least 1: a query keeps its best key")
    return top


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``dsa_attention``: eight index heads, some of negative weight, and a third of the keys chosen."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    drawn = MLA.sample(seed, s, dtype, device)
    del drawn["mask"]
    generator = torch.Generator().manual_seed(seed + 1)
    index_q, index_k, index_w = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in ((s.b, 8, s.m, 6), (s.b, 1, s.n, 6), (s.b, 8, s.m))
    )
    return {**drawn, "index_q": index_q, "index_k": index_k, "index_w": index_w + 0.5, "top": 2 + s.n // 3}


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.dsa.layer import DSAConfig, DSAttention  # noqa: E402


def _lightning(place: LayerPlace) -> DSAConfig:
    """As many keys as a window has, chosen by eight index heads of a head's size."""
    plain = MLA.preset("mla_rope").configure(place)
    head = plain.nope_size
    settings = {name: getattr(plain, name) for name in ("latent", "nope_size", "rope_size", "value_size")}
    made = DSAConfig(place.width, place.heads, **settings, index_heads=8, index_size=head, top=place.window)
    return replace(made, rotary=Rotary(plain.rope_size, style="interleaved"))


SPEC = Mechanism(
    name="dsa",
    title="DeepSeek sparse attention",
    equation="o = MLA of the keys with the largest sum_j w_j relu(q_j k)",
    papers=("arXiv 2512.02556",),
    call=call,
    function=dsa_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, rejects=cpu.rejects, grad=False),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, every_key=False),
    cost=cost,
    layer=DSAttention,
    state=LatentState,
    presets=(Preset("dsa_lightning", "DeepSeek sparse (DSA)", "arXiv 2512.02556", _lightning),),
)
