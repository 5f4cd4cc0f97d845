"""MoBA, mixture of block attention: each query attends to its own block and the few past ones that suit it best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.mechanisms.moba import chunk, cpu, selected
from attnkit.mechanisms.moba.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import PooledState

__all__ = [
    "SPEC",
    "MobaAttention",
    "MobaConfig",
    "moba_attention",
    "moba_attention_step",
    "selected_attention",
    "selected_pairs",
]


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 512,
    top: int = 3,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention of each query over ``top`` blocks of keys: its own, and the past ones of highest gate.

    The gate of a past block is the product of the query with the mean of the block's keys. A query head chooses for
    itself, even where heads share keys. Of equal gates the earlier block wins. Choosing has no gradient. The queries
    are the last ``m`` of the ``n`` positions. ``top * block >= n`` is causal softmax attention.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``m`` is at most ``n``. Gates are float32 at least.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    block: keys of a block, at least 1; the last block may have fewer.
    top: blocks that a query attends to, its own one included; 1 is attention within the own block alone.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Lu et al. 2025, MoBA: mixture of block attention for long-context LLMs, arXiv 2502.13189.
    """
    result: Tensor = run(SPEC, call(q, k, v, block=block, top=top, scale=scale), backend)
    return result


def call(
    q: Tensor, k: Tensor, v: Tensor, *, block: int = 512, top: int = 3, scale: float | None = None
) -> dict[str, Any]:
    """Check the arguments of ``moba_attention``; return them by name, as every backend gets them."""
    where = "moba_attention"
    _check(where, q, k, v)
    check(where, block=block, top=top)
    block = min(block, max(1, k.shape[2]))  # the one block of all keys can be no larger
    return {"q": q, "k": k, "v": v, "block": block, "top": top, "scale": _scale(q, scale)}


def moba_attention_step(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, *, block: int = 512, top: int = 3, scale: float | None = None
) -> Tensor:
    """The same for the newest ``m`` tokens over a state, which keeps the mean key of every complete block.

    Parameters
    ----------
    q: (b, h, m, d). k: (b, g, n, d). v: (b, g, n, e). block, top, scale: as in ``moba_attention``.
    means: (b, g, n // block, d), float32 or float64.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    """
    where = "moba_attention_step"
    _check(where, q, k, v)
    check(where, block=block, top=top)
    wanted = (*k.shape[:2], k.shape[2] // block, k.shape[3])
    if means.shape != wanted:
        raise ValueError(f"{where}: means has shape {tuple(means.shape)}, expected {wanted}, one a complete block")
    return chunk.over(q, k, v, means, block, top, _scale(q, scale))


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    block: int,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each query over its own block of keys and the blocks that are named for it.

    Parameters
    ----------
    q: (b, h, m, d). k: (b, g, n, d). v: (b, g, n, e). scale: as in ``moba_attention``.
    chosen: (b, c, m, s), int64: numbers of blocks other than the query's own, each once, -1 in places left over.
        ``c`` divides ``h`` and ``g`` divides ``c``: each run of ``h / c`` query heads reads one list.
    block: keys of a block, at least 1.
    causal: a query sees its own block up to itself, and ``chosen`` names blocks before it; else all of any block.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together. What ``chosen`` holds is not looked at.
    """
    where = "selected_attention"
    _check(where, q, k, v)
    check(where, block=block)
    lists = shapes.check(where, q=(q, "b h m d"), chosen=(chosen, "b lists m s"))["lists"]
    shapes.check_device(where, q=q, chosen=chosen)
    if chosen.dtype != torch.int64:
        raise TypeError(f"{where}: chosen has dtype {chosen.dtype}, expected int64, numbers of blocks")
    h, g = q.shape[1], k.shape[1]
    if lists == 0 or h % lists or lists % g:
        raise ValueError(
            f"{where}: chosen has {lists} lists for {h} query heads and {g} KV heads, expected a number that divides "
            f"the query heads and that the KV heads divide"
        )
    # One query fetches the blocks it chose; to pack all keys for it would cost more.
    natively = q.shape[2] > 1 and not cpu.refuses(q, k, v, _scale(q, scale)) and not cpu.dearer(q, k, v, block)
    attend = cpu.attend if natively else selected.attend
    return attend(q, k, v, chosen, block, _scale(q, scale), causal)


def check(where: str, **counts: int) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless every one is an integer of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{where}: {name} is a {type(value).__name__} ({value!r}), expected an integer")
        if value < 1:
            raise ValueError(f"{where}: {name} is {value}, expected at least 1")


def _check(where: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    sizes = shapes.check_call(where, q=(q, "b h m d"), k=(k, "b g n d"), v=(v, "b g n e"))
    shapes.check_last(where, sizes["m"], sizes["n"])


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[3] ** -0.5 if scale is None else scale)


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``moba_attention``: some 16 to 32 blocks, of which a query sees 2 to 4.

    One digit of a gate may decide which block is seen. So gates are exact in every precision, and no two of 64 blocks
    are equal: all channels but the last are small integers, and the last a multiple of 1/1024, another for each block.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    block = max(2, 1 << max(0, (s.n // 16).bit_length() - 1) >> seed % 2)
    q, k = (
        torch.randint(-1, 2, shape, generator=generator).double()
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, s.d))
    )
    q[..., -1] = torch.randint(2, (s.b, s.h, s.m), generator=generator) * 2 - 1
    order = torch.rand(s.b, s.g, -(-s.n // block), generator=generator).argsort(-1) % 64 / 1024
    k[..., -1] = order.repeat_interleave(block, -1)[..., : s.n]
    v = torch.randn(s.b, s.g, s.n, s.e, generator=generator, dtype=torch.float64)
    drawn: dict[str, Any] = {name: x.to(device, dtype) for name, x in {"q": q, "k": k, "v": v}.items()}
    return drawn | {"block": block, "top": (2, 3, 4)[seed % 3]}


def cost(sizes: Sizes, *, block: int = 512, top: int = 3, itemsize: int = 4) -> Cost:
    """Cost of one call: pairs within chosen blocks, and a gate for each complete block; the state holds their means."""
    s, means = sizes, sizes.n // block
    pairs = selected_pairs(s.n, block, top) - selected_pairs(s.n - s.m, block, top)
    read = min(s.n, s.m * block * top)
    token = s.g * (s.d + s.e) * itemsize
    return Cost(
        flops=2 * s.b * s.h * (pairs * (s.d + s.e) + s.m * means * s.d),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + read * token),
        state_bytes_per_token=token,
        state_bytes_fixed=max(1, means) * s.g * s.d * max(4, itemsize),
    )


def selected_pairs(n: int, block: int, top: int) -> int:
    """Keys that the first ``n`` positions attend to together, each in its own block and ``top - 1`` others."""
    (whole, rest), others = divmod(n, block), top - 1
    own = whole * block * (block + 1) // 2 + rest * (rest + 1) // 2
    full = max(0, whole - others)  # blocks whose queries have all the past blocks that they want
    past = (whole - full) * (whole - full - 1) // 2 + full * others
    return own + block * (block * past + rest * min(others, whole))


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.moba.layer import MobaAttention, MobaConfig  # noqa: E402


def _moba(place: LayerPlace) -> MobaConfig:
    """Four blocks that together hold two windows: 256 keys where a window has 128."""
    rotary = Rotary(place.width // place.heads)
    block = max(2, place.window // 2)
    return MobaConfig(place.width, place.heads, block=block, top=4, rotary=rotary, qk_norm=place.qk_norm)


SPEC = Mechanism(
    name="moba",
    title="Mixture of block attention (MoBA)",
    equation="o = softmax(q k^T * scale) v over the own block and those of the top q mean(k_block)",
    papers=("arXiv 2502.13189",),
    call=call,
    function=moba_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, cpu.rejects, cpu.declines),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference),
    ),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, every_key=False),
    cost=cost,
    layer=MobaAttention,
    state=PooledState,
    presets=(Preset("moba_4", "MoBA, 4 blocks a query", "arXiv 2502.13189", _moba),),
)
