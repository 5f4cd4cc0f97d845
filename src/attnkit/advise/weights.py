"""How many weights the maps of each kind of layer have. Caches and arithmetic are not counted here but by ``cost``."""

from __future__ import annotations


def softmax(
    width: int,
    h: int,
    g: int,
    d: int,
    e: int | None = None,
    *,
    bias: bool = False,
    out_bias: bool = False,
    more: int = 0,
) -> int:
    """Maps of queries, keys, values and output; ``bias`` of the first three, ``more`` for norms and gates."""
    e = d if e is None else e
    inner = h * d + g * (d + e)
    return width * (inner + h * e) + (inner if bias else 0) + (width if out_bias else 0) + more


def latent(width: int, h: int, d: int, e: int, c: int, r: int, query_rank: int | None) -> int:
    """Maps and norms of latent attention, ``d`` the whole key size with its rotary part ``r``."""
    queries = width * h * d if query_rank is None else query_rank * (width + 1 + h * d)
    return queries + width * (c + r) + c + c * h * (d - r + e) + h * e * width


def indexer(width: int, query_rank: int | None, heads: int, size: int) -> int:
    """Maps of queries, of the key with its norm, and of head weights."""
    return (query_rank or width) * heads * size + width * size + 2 * size + width * heads


def gated_delta(width: int, g: int, h: int, d: int, e: int, taps: int) -> int:
    """Gated DeltaNet as in Qwen3-Next: queries, keys, values and an output gate, two numbers a head, a convolution."""
    channels = 2 * g * d + h * e
    return width * (channels + h * e + 2 * h) + taps * channels + 2 * h + e + h * e * width


def kimi_delta(width: int, h: int, d: int, taps: int, *, low_rank: bool = True) -> int:
    """Kimi Delta Attention: three maps with convolutions, two gates, of low rank or not, a norm."""
    maps = 4 * width * h * d + 3 * taps * h * d
    gates = 2 * (width * d + d * h * d if low_rank else width * h * d) + width * h
    return maps + gates + h + h * d + d


def lightning(width: int, h: int, d: int) -> int:
    """Queries, keys, values, gate, output, and a norm over all heads."""
    return 5 * width * h * d + h * d


def mamba2(width: int, inner: int, states: int, groups: int, heads: int, taps: int, *, bias: bool, norm: bool) -> int:
    """One map in, a convolution, three numbers a head, a gated norm, one map out."""
    channels = inner + 2 * groups * states
    convolution = channels * (taps + bias)
    return width * (inner + channels + heads) + convolution + 3 * heads + (inner if norm else 0) + inner * width


def mamba(width: int, inner: int, states: int, rank: int, taps: int) -> int:
    """Mamba: one map in, a convolution with biases, steps of low rank, one map out."""
    return (
        width * 2 * inner
        + inner * (taps + 1)
        + inner * (rank + 2 * states)
        + inner * (rank + 3 + states - 1)
        + (inner * width)
    )


def compressed(
    width: int,
    h: int,
    c: int,
    query_rank: int,
    groups: int,
    out_rank: int,
    rate: int | None,
    index: tuple[int, int] | None,
) -> int:
    """DeepSeek-V4: low-rank queries, one key and value, a grouped output, and a compressor for entries."""
    found = query_rank * (width + 1 + h * c) + width * c + c + h * c * out_rank + groups * out_rank * width + h
    if rate is not None:
        series = 2 if index else 1
        found += 2 * width * series * c + rate * series * c + c
        if index:
            heads, size = index
            found += 2 * width * 2 * size + rate * 2 * size + size + query_rank * heads * size + width * heads
    return found


def feed_forward(width: int, inner: int, *, gated: bool = True, bias: bool = False) -> int:
    """Two maps, or three with a gate."""
    return (3 if gated else 2) * width * inner + ((inner + width) if bias else 0)
