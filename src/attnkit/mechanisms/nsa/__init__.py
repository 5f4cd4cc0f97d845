"""Native sparse attention (NSA): a coarse look at everything, a close one at the best blocks, and a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import symmetric_window
from attnkit.masks import window as last
from attnkit.mechanisms.nsa import chunk, cpu
from attnkit.mechanisms.nsa.blocks import Blocks, check, windows
from attnkit.mechanisms.nsa.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import PooledState

__all__ = [
    "SPEC",
    "NsaAttention",
    "NsaConfig",
    "nsa_attention",
    "nsa_attention_step",
    "windows",
]


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gates: Tensor,
    *,
    length: int = 32,
    stride: int = 16,
    block: int = 64,
    selected: int = 16,
    window: int = 512,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each query to compressed blocks, to selected blocks of tokens and to a window, joined by gates.

    ``o = gate_0 attend(compressed) + gate_1 attend(selected) + gate_2 attend(window)``, each a softmax attention with
    keys and values of its own. The weights of the first, summed over the query heads that share a KV head, rank the
    blocks of the second: a group of heads selects together. The first block, the query's own and the one before it are
    always selected; of equal blocks the earlier wins. Selection has no gradient. The queries are the last ``m`` of
    ``n`` positions.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``m`` is at most ``n``.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    compressed_k: (b, g, c, d), compressed_v: (b, g, c, e): entry ``i`` stands for tokens ``i * stride`` to
        ``i * stride + length - 1`` (``windows`` cuts them out) and is seen from the last of them on. ``c`` is at least
        the number of blocks that end within ``n`` tokens.
    window_k: (b, g, n, d), window_v: (b, g, n, e).
    gates: (b, h, m, 3), any floating dtype, of the compressed, the selected and the window branch.
    length, stride: tokens of a compressed block, a multiple of ``stride``, and from the start of one to the next.
    block: tokens of a selection block, a multiple of ``stride``.
    selected: selection blocks of a query, at least those that always are, 3 or, when not causal, 4.
    window: tokens that the third branch sees, the query's own included.
    causal: False lets a query see later tokens too: all compressed blocks, the block after its own, which is always
        selected then, later ones of high importance, and tokens less than ``window`` away on either side.
    scale: multiplies ``q k^T`` in all branches; ``d ** -0.5`` when None.
    backend: "cpu", "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Yuan et al. 2025, Native sparse attention, arXiv 2502.11089.
    """
    checked = call(
        q,
        k,
        v,
        compressed_k,
        compressed_v,
        window_k,
        window_v,
        gates,
        length=length,
        stride=stride,
        block=block,
        selected=selected,
        window=window,
        causal=causal,
        scale=scale,
    )
    result: Tensor = run(SPEC, checked, backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gates: Tensor,
    *,
    length: int = 32,
    stride: int = 16,
    block: int = 64,
    selected: int = 16,
    window: int = 512,
    causal: bool = True,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``nsa_attention``; return them by name, as every backend gets them."""
    where, blocks = "nsa_attention", Blocks(length, stride, block, selected)
    made = _checked(
        where, "n", q, k, v, compressed_k, compressed_v, window_k, window_v, gates, blocks, window, causal, scale
    )
    return made


def nsa_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gates: Tensor,
    *,
    length: int = 32,
    stride: int = 16,
    block: int = 64,
    selected: int = 16,
    window: int = 512,
    scale: float | None = None,
) -> Tensor:
    """The same for the newest ``m`` tokens over a state, which has let go of what no window reaches any more.

    Parameters
    ----------
    q, k, v, compressed_k, compressed_v, gates, and all options: as in ``nsa_attention``.
    window_k: (b, g, w, d), window_v: (b, g, w, e): the last tokens in their order, at least the last
        ``window - 1 + m`` as far as there are so many; for one query in any order, and no more than ``window``.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.
    """
    where, blocks = "nsa_attention_step", Blocks(length, stride, block, selected)
    made = _checked(
        where, "held", q, k, v, compressed_k, compressed_v, window_k, window_v, gates, blocks, window, True, scale
    )
    needed = min(k.shape[2], window - 1 + q.shape[2])
    if window_k.shape[2] < needed:
        raise ValueError(f"{where}: window_k has {window_k.shape[2]} tokens, expected at least the last {needed}")
    return chunk.forward(**made)


def _checked(
    where: str,
    held: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gates: Tensor,
    blocks: Blocks,
    window: int,
    causal: bool,
    scale: float | None,
) -> dict[str, Any]:
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "compressed_k": compressed_k,
        "compressed_v": compressed_v,
        "window_k": window_k,
        "window_v": window_v,
    }
    axes = ("b h m d", "b g n d", "b g n e", "b g blocks d", "b g blocks e", f"b g {held} d", f"b g {held} e")
    patterns = {name: (x, pattern) for (name, x), pattern in zip(tensors.items(), axes, strict=True)}
    sizes = shapes.check(where, **patterns, gates=(gates, "b h m branches"))
    shapes.check_same(where, **tensors)
    shapes.check_device(where, q=q, gates=gates)
    shapes.check_groups(where, sizes["h"], sizes["g"])
    shapes.check_last(where, sizes["m"], sizes["n"])
    check(where, blocks, window, causal)
    if sizes["branches"] != 3 or not gates.is_floating_point():
        raise ValueError(
            f"{where}: gates is {gates.dtype} of shape {tuple(gates.shape)}, expected 3 floating numbers a query: of "
            f"the compressed, the selected and the window branch"
        )
    if sizes["blocks"] < blocks.compressed(sizes["n"]):
        raise ValueError(
            f"{where}: compressed_k has {sizes['blocks']} blocks, expected at least {blocks.compressed(sizes['n'])}, "
            f"those of {blocks.length} tokens, one every {blocks.stride}, that end within {sizes['n']}"
        )
    scale = sizes["d"] ** -0.5 if scale is None else float(scale)
    return tensors | {"gates": gates, "blocks": blocks, "window": window, "causal": causal, "scale": scale}


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``nsa_attention``: the paper's sizes for 8,192 tokens, and smaller blocks for fewer tokens.

    A compressed block that lies half in one block and half in the next counts the same for both. Where it takes all the
    weight, the last digit of the others decides which is selected: so compressed keys are short, and weights moderate.
    """
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    stride = min(16, s.n // 512) if s.n >= 512 else 1 + (seed % 2 if s.n > 8 else 0)
    blocks = Blocks(2 * stride, stride, (4 if s.n > 8 else 2) * stride, 16 if s.n >= 512 else 4 + seed % 3 % 2)
    keys, values, compressed = (s.b, s.g, s.n, s.d), (s.b, s.g, s.n, s.e), blocks.compressed(s.n)
    drawn = {
        "q": (s.b, s.h, s.m, s.d),
        "k": keys,
        "v": values,
        "compressed_k": (s.b, s.g, compressed, s.d),
        "compressed_v": (s.b, s.g, compressed, s.e),
        "window_k": keys,
        "window_v": values,
        "gates": (s.b, s.h, s.m, 3),
    }
    made: dict[str, Any] = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in drawn.items()
    }
    made["gates"] = made["gates"].sigmoid()
    made["compressed_k"] *= s.d**-0.25
    made = {name: x.to(device, dtype) for name, x in made.items()}
    return made | blocks._asdict() | {"window": 32 * stride if s.n >= 512 else 1 + s.n // 4}


def cost(
    sizes: Sizes,
    *,
    length: int = 32,
    stride: int = 16,
    block: int = 64,
    selected: int = 16,
    window: int = 512,
    causal: bool = True,
    itemsize: int = 4,
) -> Cost:
    """Cost of one call, without compressing; the state has all tokens once, two rings, and the compressed blocks."""
    s, blocks = sizes, Blocks(length, stride, block, selected)
    if causal:
        pairs = blocks.pairs(s.n) - blocks.pairs(s.n - s.m) + last(window).visible_pairs(s.m, s.n)
    else:
        pairs = s.m * (blocks.compressed(s.n) + min(s.n, block * selected))
        pairs += symmetric_window(window - 1).visible_pairs(s.m, s.n)
    token = s.g * (s.d + s.e) * itemsize
    read = min(s.n, s.m * block * selected) + min(s.n, window - 1 + s.m) + blocks.compressed(s.n)
    rings = min(s.n, window) + min(s.n, length)
    return Cost(
        flops=2 * s.b * s.h * pairs * (s.d + s.e),
        bytes=s.b * (s.h * s.m * (s.d + s.e + 3) * itemsize + read * token),
        state_bytes_per_token=token,
        state_bytes_fixed=(rings + max(1, blocks.compressed(s.n))) * token,
    )


def _cpu() -> Any:
    return cpu.forward


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.nsa.layer import NsaAttention, NsaConfig  # noqa: E402


def _nsa(place: LayerPlace) -> NsaConfig:
    """The paper's proportions: blocks of two and of four strides, and twice as many tokens selected as in the window.

    A quarter of the heads hold keys, of each of the three kinds: fewer numbers than softmax attention with one kind.
    """
    stride = max(1, place.window // 16)
    return NsaConfig(
        place.width,
        place.heads,
        kv_heads=max(1, place.heads // 4),
        length=2 * stride,
        stride=stride,
        block=4 * stride,
        selected=max(4, 2 * place.window // (4 * stride)),
        window=place.window,
        rotary=Rotary(place.width // place.heads),
        qk_norm=place.qk_norm,
    )


SPEC = Mechanism(
    name="nsa",
    title="Native sparse attention (NSA)",
    equation="o = g_0 attend(compressed blocks) + g_1 attend(top blocks by those weights) + g_2 attend(window)",
    papers=("arXiv 2502.11089",),
    call=call,
    function=nsa_attention,
    sample=sample,
    reference=reference,
    backends=(
        Backend("cpu", _cpu, rejects=cpu.rejects, finite_only=True),
        Backend("chunk", _chunk, finite_only=True),
        Backend("reference", _reference),
    ),
    laws=Laws(
        causal=True,
        stateful=True,
        step_equals_prefill=True,
        length_invariant=True,
        separate_readers=False,
        every_key=False,
        weights_sum_to_one=False,
    ),
    cost=cost,
    layer=NsaAttention,
    state=PooledState,
    presets=(Preset("nsa_8", "NSA, 8 blocks selected", "arXiv 2502.11089", _nsa),),
)
