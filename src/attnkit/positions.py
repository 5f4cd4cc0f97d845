"""Positions inside attention: rotary embeddings with their scalings, ALiBi slopes, T5's relative buckets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Position interpolation: every frequency divided by ``factor`` (arXiv 2306.15595)."""

    factor: float

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        return frequencies / self.factor

    attention_factor = 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: long wavelengths divided by ``factor``, short ones kept, a ramp between."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        wavelength = 2 * math.pi / frequencies
        ramp = ((self.original / wavelength - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - ramp) * frequencies / self.factor + ramp * frequencies

    attention_factor = 1.0


@dataclass(frozen=True)
class YaRN:
    """YaRN (arXiv 2309.00071): interpolates slow frequencies only; cos and sin grow by ``attention_factor``.

    DeepSeek lets logits grow by ``logit_factor`` instead, channels that rotary leaves alone included: ``mscale_all`` is
    its ``mscale_all_dim``, and with ``mscale`` the same, cos and sin stay as they are.
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    mscale: float = 1.0
    mscale_all: float = 0.0

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        size = 2 * frequencies.numel()
        low, high = self.bounds(size, base)
        index = torch.arange(size // 2, dtype=frequencies.dtype, device=frequencies.device)
        ramp = ((index - low) / (high - low)).clamp(0, 1)
        return frequencies / self.factor * ramp + frequencies * (1 - ramp)

    def bounds(self, size: int, base: float) -> tuple[float, float]:
        """First and last pair index of the ramp."""

        def pair(rotations: float) -> float:
            return size * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair(self.fast), pair(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        return low, high + (0.001 if low == high else 0)

    @property
    def attention_factor(self) -> float:
        return self._growth(self.mscale) / self._growth(self.mscale_all)

    @property
    def logit_factor(self) -> float:
        """What multiplies the scale of latent attention's logits."""
        return self._growth(self.mscale_all) ** 2

    def _growth(self, share: float) -> float:
        return 0.1 * share * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of the first ``rotary_size`` of ``head_size`` channels.

    ``style="half"`` pairs channel ``i`` with ``i + rotary_size / 2`` (GPT-NeoX, Hugging Face Llama); ``"interleaved"``
    pairs ``2i`` with ``2i + 1`` (GPT-J, Meta's Llama, DeepSeek). Weights trained with one style are wrong under the
    other.
    """

    head_size: int
    base: float = 10000.0
    style: Literal["half", "interleaved"] = "half"
    scaling: Linear | Llama3 | YaRN | None = None
    rotary_size: int | None = None

    def __post_init__(self) -> None:
        if self.style not in ("half", "interleaved"):
            raise ValueError(f"Rotary: style is {self.style!r}, expected 'half' or 'interleaved'")
        if self.size % 2 or not 0 < self.size <= self.head_size:
            raise ValueError(
                f"Rotary: rotary size is {self.size}, expected an even number up to head size {self.head_size}"
            )

    @property
    def size(self) -> int:
        return self.head_size if self.rotary_size is None else self.rotary_size

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """Radians a position of each pair, float64 ``(size / 2,)``."""
        exponent = torch.arange(0, self.size, 2, dtype=torch.float64, device=device) / self.size
        plain = self.base**-exponent
        return self.scaling.apply(plain, self.base) if self.scaling else plain

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``(..., size / 2)`` for integer positions ``(...)``; angles are formed in float64.

        float32 angles are off by whole radians beyond position 10^7 and by 0.004 at 131,071.
        """
        angle = positions.to(torch.float64)[..., None] * self.frequencies(positions.device)
        factor = self.scaling.attention_factor if self.scaling else 1.0
        return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``x`` ``(b, h, n, d)`` by ``positions`` ``(n,)`` or ``(b, n)``, float32 at least inside."""
        if x.shape[-1] != self.head_size:
            raise ValueError(f"rotate: x has head size {x.shape[-1]}, expected {self.head_size}")
        work = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.tables(positions if positions.dim() == 1 else positions[:, None], work)
        turned, rest = x[..., : self.size].to(work), x[..., self.size :]
        if self.style == "half":
            one, two = turned.chunk(2, -1)
            turned = torch.cat([one * cos - two * sin, one * sin + two * cos], -1)
        else:
            one, two = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2)
        return torch.cat([turned.to(x.dtype), rest], -1)


def distance(m: int, n: int, device: torch.device | str | None = None) -> Tensor:
    """``|q - k|`` of the last ``m`` of ``n`` positions and all ``n``: int64 ``(m, n)``."""
    return (torch.arange(n - m, n, device=device)[:, None] - torch.arange(n, device=device)).abs()


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes ``(heads,)`` float32: ``logit -= slope * |q - k|`` (Press et al., arXiv 2108.12409)."""
    if heads < 1:
        raise ValueError(f"alibi_slopes: heads is {heads}, expected at least 1")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return torch.tensor(slopes)


@dataclass(frozen=True)
class T5Buckets:
    """T5's relative position buckets (arXiv 1910.10683): exact up close, logarithmic further out."""

    buckets: int = 32
    distance: int = 128
    bidirectional: bool = False

    def index(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bucket of each pair, int64 ``(m, n)``, from positions ``(m,)`` and ``(n,)``."""
        gap = keys[None, :] - queries[:, None]
        count, start = self.buckets, torch.zeros_like(gap)
        if self.bidirectional:
            count //= 2
            start, gap = count * (gap > 0).long(), gap.abs()
        else:
            gap = (-gap).clamp(min=0)
        exact = count // 2
        # float32 as in the released model: float64 moves the edge of a bucket at distance 128.
        ratio = torch.log(gap.clamp(min=1).float() / exact) / math.log(self.distance / exact)
        far = exact + (ratio * (count - exact)).long()
        return start + torch.where(gap < exact, gap, far.clamp(max=count - 1))

    def bias(self, table: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Additive bias ``(1, h, m, n)`` from a learned table ``(buckets, h)``; T5 uses it with ``scale=1``."""
        if table.dim() != 2 or table.shape[0] != self.buckets:
            raise ValueError(f"T5 bias: table has shape {tuple(table.shape)}, expected ({self.buckets}, heads)")
        return table[self.index(queries, keys)].permute(2, 0, 1)[None]
