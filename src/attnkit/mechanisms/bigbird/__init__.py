"""BigBird attention: blocks of queries see the first and last block, their neighbours and a few random blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import random_blocks as draw
from attnkit.mechanisms.bigbird import chunk, cpu
from attnkit.mechanisms.bigbird.reference import forward as reference
from attnkit.spec import Backend, Cost, Laws, Mechanism, Sizes

__all__ = ["SPEC", "BigBirdAttention", "BigBirdConfig", "bigbird_attention"]


def bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    random_blocks: Tensor,
    *,
    block: int = 64,
    window: int = 3,
    keep: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Bidirectional softmax attention by blocks, each key block once: global, near and random (the paper's ITC).

    The first and the last block see all and are seen by all. A block between them sees besides ``window`` blocks around
    itself and those that ``random_blocks`` names.

    Parameters
    ----------
    q: (b, h, n, d), float64, float32, bfloat16 or float16; ``n`` need not be a multiple of ``block``.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    random_blocks: (h, blocks, r) or (1, blocks, r), integers: the random key blocks of each query block, as
        ``attnkit.masks.random_blocks`` draws them. -1 is none; none may repeat, lie in the window or be first or last.
        Rows of the first and the last block are not read.
    block: positions a block has. window: blocks around, an odd number.
    keep: (b, n), bool, True for a real token; padding is seen by none and its own rows are 0.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, n, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together; NotImplementedError: the named backend cannot run them.

    Source: Zaheer et al. 2020, arXiv 2007.14062.
    """
    checked = call(q, k, v, random_blocks, block=block, window=window, keep=keep, scale=scale)
    result: Tensor = run(SPEC, checked, backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    random_blocks: Tensor,
    *,
    block: int = 64,
    window: int = 3,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``bigbird_attention``; return them by name, as every backend gets them."""
    where = "bigbird_attention"
    sizes = shapes.check(where, q=(q, "b h n d"), k=(k, "b g n d"), v=(v, "b g n e"))
    shapes.check_same(where, q=q, k=k, v=v)
    if not isinstance(random_blocks, Tensor):
        raise TypeError(f"{where}: random_blocks is a {type(random_blocks).__name__}, expected a tensor of integers")
    shapes.check_device(where, q=q, random_blocks=random_blocks)
    shapes.check_groups(where, sizes["h"], sizes["g"])
    if block < 1 or window < 1 or window % 2 == 0:
        raise ValueError(
            f"{where}: block is {block} and window {window}, expected at least 1, the window an odd number"
        )
    keep = shapes.kept(where, q, keep)
    _check_blocks(where, random_blocks, sizes["h"], -(-sizes["n"] // block), window)
    return {
        "q": q,
        "k": k,
        "v": v,
        "random_blocks": random_blocks.long(),
        "block": block,
        "window": window,
        "keep": keep,
        "scale": q.shape[3] ** -0.5 if scale is None else float(scale),
    }


def _check_blocks(where: str, random: Tensor, h: int, blocks: int, window: int) -> None:
    if random.is_floating_point() or random.dtype == torch.bool:
        raise TypeError(f"{where}: random_blocks has dtype {random.dtype}, expected integers, -1 for none")
    if random.dim() != 3 or random.shape[0] not in (1, h) or random.shape[1] != blocks:
        raise ValueError(
            f"{where}: random_blocks has shape {tuple(random.shape)}, expected ({h} or 1, {blocks}, r): one row a block"
        )
    # Looking at values would break a graph that is being traced, and `attnkit explain` asks with tensors without any.
    if torch.compiler.is_compiling() or isinstance(random, FakeTensor) or blocks < 3:
        return
    row, inner = torch.arange(1, blocks - 1, device=random.device)[:, None], random[:, 1:-1].sort(-1).values
    wrong = (inner < -1) | (inner == 0) | (inner >= blocks - 1) | ((inner - row).abs() <= window // 2) & (inner >= 0)
    wrong[..., 1:] |= (inner.diff(dim=-1) == 0) & (inner[..., 1:] >= 0)
    if bool(wrong.any()):
        head, line, place = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"{where}: random_blocks holds {int(inner[head, line, place])} for block {line + 1} of head {head}, "
            f"expected -1, or 1 to {blocks - 2} outside its window and each once"
        )


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``bigbird_attention``: blocks of 4 positions, two random ones, other ones in every head.

    Every other seed pads up to a third of each sequence. There are as many queries as keys, whatever ``sizes.m``.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in ((s.b, s.h, s.n, s.d), (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e))
    )
    random = draw(-(-s.n // 4), random=2, heads=s.h, seed=seed).to(device)
    given = {"q": q, "k": k, "v": v, "random_blocks": random, "block": 4}
    if seed % 2:
        real = s.n - torch.randint(s.n // 3 + 1, (s.b, 1), generator=generator)
        given["keep"] = (torch.arange(s.n) < real).to(device)
    return given


def cost(sizes: Sizes, *, block: int = 64, window: int = 3, random: int = 3, itemsize: int = 4) -> Cost:
    """Cost of one call over ``sizes.n`` tokens; there is no decoding and no state."""
    s = sizes
    blocks = -(-s.n // block)
    inner = max(0, blocks - 2)
    pairs = min(s.n, 2 * block) * s.n + inner * block * min(s.n, (2 + window + random) * block)
    return Cost(
        flops=2 * s.b * s.h * min(pairs, s.n * s.n) * (s.d + s.e),
        bytes=s.b * s.n * (s.h + s.g) * (s.d + s.e) * itemsize,
        state_bytes_per_token=0,
        state_bytes_fixed=0,
    )


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.bigbird.layer import BigBirdAttention, BigBirdConfig  # noqa: E402

SPEC = Mechanism(
    name="bigbird",
    title="BigBird attention",
    equation="o = softmax(q k^T * scale over blocks that are first, last, near or random) v",
    papers=("arXiv 2007.14062",),
    call=call,
    function=bigbird_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, cpu.rejects),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference),
    ),
    # The last block is seen by all, so no later token can be added: an encoder's layer, with no state and, for the same
    # reason, no presets, which are rows of decoders.
    laws=Laws(causal=False, stateful=False, step_equals_prefill=False, length_invariant=True),
    cost=cost,
    layer=BigBirdAttention,
)
