"""Multi-token attention (MTA): logits of nearby queries and keys, and of other heads, have a say in each logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.dispatch import run
from attnkit.masks import causal
from attnkit.mechanisms.multi_token import chunk
from attnkit.mechanisms.multi_token.reference import forward as reference
from attnkit.positions import Rotary
from attnkit.spec import Backend, Cost, Laws, LayerPlace, Mechanism, Preset, Sizes
from attnkit.state import RewrittenState

__all__ = [
    "SPEC",
    "MultiTokenAttention",
    "MultiTokenConfig",
    "multi_token_attention",
    "multi_token_attention_step",
]


def multi_token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor | None = None,
    mix_logits: Tensor | None = None,
    mix_weights: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention whose logits are convolved over queries and keys, and mixed across heads.

    The queries are the last ``m`` of the ``n`` positions; those before count as 0 in the convolution. Products with
    later keys are 0 before it and hidden after it, so that nothing of the future enters.

    Parameters
    ----------
    q: (b, h, m, d), float64, float32, bfloat16 or float16; ``m`` is at most ``n``.
    k: (b, g, n, d), same dtype and device; ``g`` divides ``h``, and query head ``i`` reads KV head ``i // (h / g)``.
    v: (b, g, n, e); ``e`` may differ from ``d``.
    kernel: (h, s, t), floating, ``t`` odd: weights over the query and the ``s - 1`` before it (the query's own row is
        the last) and over ``t`` keys around the key (its own column is in the middle); None for no convolution.
    mix_logits: (h, c), floating, ``c`` divides ``h``: how much of the logits of each head of its group of ``c`` heads
        a head takes, after the convolution; None for its own.
    mix_weights: the same for the weights after softmax; rows of weights then no longer sum to 1.
    scale: multiplies ``q k^T``; ``d ** -0.5`` when None.
    backend: "chunk" or "reference", which then runs or raises; None takes the first that can run.

    Returns
    -------
    o: (b, h, m, e) in q's dtype.

    Raises
    ------
    ValueError, TypeError: arguments that do not fit together.

    Source: Golovneva et al. 2025, arXiv 2504.00927.
    """
    result: Tensor = run(SPEC, call(q, k, v, kernel, mix_logits, mix_weights, scale=scale), backend)
    return result


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor | None = None,
    mix_logits: Tensor | None = None,
    mix_weights: Tensor | None = None,
    *,
    scale: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``multi_token_attention``; return them by name, as every backend gets them."""
    where = "multi_token_attention"
    sizes = _check(where, q, k, v, {"kernel": kernel, "mix_logits": mix_logits, "mix_weights": mix_weights})
    shapes.check_last(where, sizes["m"], sizes["n"])
    given = {"q": q, "k": k, "v": v, "kernel": kernel, "mix_logits": mix_logits, "mix_weights": mix_weights}
    return {**given, "scale": q.shape[3] ** -0.5 if scale is None else float(scale)}


def multi_token_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor | None = None,
    mix_logits: Tensor | None = None,
    mix_weights: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """The same for the newest ``m`` tokens over a state, which also holds the ``s - 1`` queries before them.

    Parameters
    ----------
    q: (b, h, s - 1 + m, d): the queries of the ``s - 1`` tokens before, zeros before the first token, then the new.
    k, v, kernel, mix_logits, mix_weights, scale: as in ``multi_token_attention``.

    Returns
    -------
    o: (b, h, m, e) in q's dtype: rows of the new tokens.
    """
    where = "multi_token_attention_step"
    sizes = _check(where, q, k, v, {"kernel": kernel, "mix_logits": mix_logits, "mix_weights": mix_weights})
    before = 0 if kernel is None else kernel.shape[1] - 1
    if not before <= sizes["m"] <= before + sizes["n"]:
        raise ValueError(
            f"{where}: got {sizes['m']} queries and {sizes['n']} keys, expected the {before} queries before the new "
            f"tokens and at most as many new ones as keys"
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return chunk.attend(q, k, v, kernel, mix_logits, mix_weights, scale)


def _check(where: str, q: Tensor, k: Tensor, v: Tensor, weights: dict[str, Tensor | None]) -> dict[str, int]:
    patterns = {
        "kernel": "h kernel_queries kernel_keys",
        "mix_logits": "h mixed_logits",
        "mix_weights": "h mixed_weights",
    }
    given = {name: x for name, x in weights.items() if x is not None}
    sizes = shapes.check_call(
        where,
        q=(q, "b h m d"),
        k=(k, "b g n d"),
        v=(v, "b g n e"),
        **{name: (x, patterns[name]) for name, x in given.items()},
    )
    if sizes.get("kernel_queries") == 0 or sizes.get("kernel_keys", 1) % 2 == 0:
        raise ValueError(
            f"{where}: kernel has {sizes['kernel_queries']} rows and {sizes['kernel_keys']} columns, expected at least "
            f"1 row and an odd number of columns"
        )
    for name, size in (("mix_logits", "mixed_logits"), ("mix_weights", "mixed_weights")):
        if name in given and (sizes[size] == 0 or sizes["h"] % sizes[size]):
            raise ValueError(
                f"{where}: {name} mixes {sizes[size]} of {sizes['h']} heads, expected a number that divides the heads"
            )
    return sizes


def sample(
    seed: int = 0,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for ``multi_token_attention``: kernels of 3 x 5 and mixtures, far from their neutral start."""
    s = sizes or Sizes(b=2, h=4, g=2, m=37, n=37, d=16, e=8)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, kernel, mix_logits, mix_weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (
            (s.b, s.h, s.m, s.d),
            (s.b, s.g, s.n, s.d),
            (s.b, s.g, s.n, s.e),
            (s.h, 3, 5),
            (s.h, s.h),
            (s.h, s.h),
        )
    )
    drawn = {"q": q, "k": k, "v": v, "kernel": kernel / 3, "mix_logits": mix_logits / s.h**0.5}
    drawn["mix_weights"] = mix_weights / s.h**0.5
    return {name: x.to(device, dtype) for name, x in drawn.items()}


def cost(sizes: Sizes, *, taps: tuple[int, int] = (6, 11), mixed: tuple[int, int] = (1, 2), itemsize: int = 4) -> Cost:
    """Cost of one call with a kernel of ``taps`` (queries, keys) and groups of ``mixed`` (logits, weights) heads.

    The state is a plain cache and the queries that the kernel still reaches.
    """
    s, (rows, columns), (before, after) = sizes, taps, mixed
    token = s.g * (s.d + s.e) * itemsize
    pairs = causal().visible_pairs(s.m, s.n)
    each = s.d + rows * columns * (rows * columns > 1) + before * (before > 1) + after * s.e
    return Cost(
        flops=2 * s.b * s.h * pairs * each,
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + s.n * token),
        state_bytes_per_token=token,
        state_bytes_fixed=(rows - 1) * s.h * s.d * itemsize,
    )


def _chunk() -> Any:
    return chunk.forward


def _reference() -> Any:
    return reference


# The layer calls the function above, so it can only be imported here.
from attnkit.mechanisms.multi_token.layer import MultiTokenAttention, MultiTokenConfig  # noqa: E402


def _preset(place: LayerPlace) -> MultiTokenConfig:
    # The paper convolves in layers 2, 6, 10 ... and mixes heads in all; a smaller model does in its last layer.
    convolved = place.layer % 4 == min(2, place.layers - 1)
    return MultiTokenConfig(
        place.width,
        place.heads,
        taps=(6, 11) if convolved else (1, 1),
        mixed_weights=2 if place.heads % 2 == 0 else 1,
        rotary=Rotary(place.width // place.heads),
        qk_norm=place.qk_norm,
    )


SPEC = Mechanism(
    name="multi_token",
    title="Multi-token attention",
    equation="o = mix(softmax(causal(mix(conv(tril(q k^T * scale)))))) v",
    papers=("arXiv 2504.00927",),
    call=call,
    function=multi_token_attention,
    sample=sample,
    reference=reference,
    backends=(Backend("chunk", _chunk, finite_only=True), Backend("reference", _reference)),
    laws=Laws(causal=True, stateful=True, step_equals_prefill=True, length_invariant=True, separate_heads=False),
    cost=cost,
    layer=MultiTokenAttention,
    state=RewrittenState,
    presets=(Preset("mta", "Multi-token (MTA)", "arXiv 2504.00927", _preset),),
)
