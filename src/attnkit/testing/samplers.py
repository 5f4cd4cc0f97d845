"""Random calls of a mechanism: sizes that are seldom tried, every feature its function has, awkward memory layouts.

Everything is drawn from a ``random.Random``, so that a seed replays a call; ``strategies`` hands hypothesis's own in.
A feature is a keyword of the mechanism's function: a mechanism that takes ``softcap`` or ``mask`` gets some.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.positions import alibi_slopes
from attnkit.spec import Mechanism, Sizes
from attnkit.testing.rules import any_rule

LENGTHS = (1, 2, 3, 5, 8, 17, 31, 47, 48, 49, 63, 64, 65, 97, 130)
HEAD_SIZES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 59, 64, 80, 111, 128, 160, 256)


def features(spec: Mechanism) -> tuple[str, ...]:
    """The keywords of the mechanism's function that the sampler can draw."""
    return tuple(name for name in inspect.signature(spec.call).parameters if name in DRAW)


def sizes(spec: Mechanism, rng: random.Random, largest: int = 130) -> Sizes:
    """Sizes of one call; more keys than queries (and now and then fewer) where the mechanism has masks."""
    g, r = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3, 4))
    n = rng.choice([length for length in LENGTHS if length <= largest])
    m = n
    if "mask" in features(spec) and rng.random() < 0.5:
        m = rng.randint(1, n + 2)
    d = rng.choice(HEAD_SIZES)
    e = d if rng.random() < 0.5 else rng.choice(HEAD_SIZES)
    return Sizes(b=rng.choice((1, 1, 2, 3)), h=g * r, g=g, m=m, n=n, d=d, e=e)


def arguments(
    spec: Mechanism,
    rng: random.Random,
    *,
    of: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    only: tuple[str, ...] | None = None,
    layouts: bool = True,
) -> dict[str, Any]:
    """A random call: ``spec.sample`` at random sizes, with a few features, or with all of ``only``."""
    size = of or sizes(spec, rng)
    drawn = spec.sample(rng.randrange(1 << 30), size, dtype)
    for name in features(spec):
        drawn.pop(name, None)
        if name in only if only is not None else rng.random() < 0.35:
            drawn[name] = DRAW[name](rng, size, dtype)
    if layouts:
        for name, x in drawn.items():
            if isinstance(x, Tensor) and x.dim() == 4 and name not in features(spec):
                drawn[name] = laid_out(rng, x)
    return drawn


def laid_out(rng: random.Random, x: Tensor) -> Tensor:
    """The same values in another memory layout; ``expanded`` repeats the first sequence or head over all."""
    return LAYOUTS[rng.choice(list(LAYOUTS))](x)


def _sliced(x: Tensor) -> Tensor:
    big = x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 5), torch.nan)
    view = big[:, :, 2 : 2 + x.shape[2], 1 : 1 + x.shape[3]]
    view.copy_(x)
    return view


def _strided(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:3], 2 * x.shape[3]), torch.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def _far(x: Tensor) -> Tensor:
    """Strides of dimensions of size 1 are never used, and torch leaves any number there."""
    steps = [2**40 if size == 1 else step for size, step in zip(x.shape, x.contiguous().stride(), strict=True)]
    return x.contiguous().as_strided(x.shape, steps)


def _offset(x: Tensor) -> Tensor:
    flat = x.new_full((x.numel() + 1,), torch.nan)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "keys innermost": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded heads": lambda x: x[:, :1].expand(x.shape),
    "sliced": _sliced,
    "innermost strided": _strided,
    "offset": _offset,
    "far apart": _far,
}


def _mask(rng: random.Random, size: Sizes, dtype: torch.dtype) -> Any:
    return any_rule(rng, size.b, size.h, size.m, size.n).mask


def _bias(rng: random.Random, size: Sizes, dtype: torch.dtype) -> Tensor:
    full = (size.b, size.h, size.m, size.n)
    shape = [length if rng.random() < 0.6 else 1 for length in full][rng.randrange(4) :]
    bias = _normal(rng, tuple(shape)).to(rng.choice((dtype, torch.float32)))
    if rng.random() < 0.3:
        bias = torch.where(_normal(rng, tuple(shape)) > 1, -torch.inf, bias)
    return bias


def _alibi(rng: random.Random, size: Sizes, dtype: torch.dtype) -> Tensor:
    return alibi_slopes(size.h) * rng.choice((0.1, 1.0))


def _sink(rng: random.Random, size: Sizes, dtype: torch.dtype) -> Tensor:
    return (2 * _normal(rng, (size.h,))).to(rng.choice((dtype, torch.float32)))


def _normal(rng: random.Random, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.randn(shape, generator=generator)


DRAW: dict[str, Callable[[random.Random, Sizes, torch.dtype], Any]] = {
    "mask": _mask,
    "scale": lambda rng, size, dtype: rng.choice((0.05, 0.3, 1.0)),
    "bias": _bias,
    "alibi": _alibi,
    "softcap": lambda rng, size, dtype: rng.choice((0.5, 2.0, 30.0)),
    "sink": _sink,
    "return_lse": lambda rng, size, dtype: True,
}
