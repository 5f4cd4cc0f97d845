"""What each mask means, said a second time in plain Python for one pair at a time.

Oracles and probes compare with these rules and never with the mask algebra, which is what they test.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import attnkit
from attnkit.masks import Mask

Sees = Callable[[int, int, int, int], bool]
"""``sees(b, h, q, k)`` for absolute positions."""


@dataclass(frozen=True)
class Rule:
    """A mask and what it means."""

    mask: Mask
    sees: Sees

    def table(self, b: int, h: int, m: int, n: int) -> torch.Tensor:
        """Bool ``(b, h, m, n)``, one pair at a time."""
        return torch.tensor(
            [
                [[[self.sees(bb, hh, n - m + i, j) for j in range(n)] for i in range(m)] for hh in range(h)]
                for bb in range(b)
            ],
            dtype=torch.bool,
        ).reshape(b, h, m, n)


def any_rule(rng: random.Random, b: int, h: int, m: int, n: int, depth: int = 1) -> Rule:
    """A random mask that fits a call of these sizes, now and then a combination of two."""
    if depth and rng.random() < 0.3:
        one, two = (any_rule(rng, b, h, m, n, depth - 1) for _ in range(2))
        return _combined(rng.choice("&|~"), one, two)
    # Masks made for the keys of a call cannot serve queries from before the first of them.
    kinds = [kind for kind in KINDS if m <= n or kind not in WITHIN]
    return KINDS[rng.choice(kinds)](rng, b, h, m, n)


def _combined(how: str, one: Rule, two: Rule) -> Rule:
    if how == "~":
        return Rule(~one.mask, lambda b, h, q, k: not one.sees(b, h, q, k))
    if how == "&":
        return Rule(one.mask & two.mask, lambda b, h, q, k: one.sees(b, h, q, k) and two.sees(b, h, q, k))
    return Rule(one.mask | two.mask, lambda b, h, q, k: one.sees(b, h, q, k) or two.sees(b, h, q, k))


def full() -> Rule:
    return Rule(attnkit.full(), lambda b, h, q, k: True)


def causal() -> Rule:
    return Rule(attnkit.causal(), lambda b, h, q, k: k <= q)


def window(size: int) -> Rule:
    return Rule(attnkit.window(size), lambda b, h, q, k: q - size < k <= q)


def symmetric_window(radius: int) -> Rule:
    return Rule(attnkit.symmetric_window(radius), lambda b, h, q, k: abs(q - k) <= radius)


def dilated_window(size: int, dilation: int) -> Rule:
    return Rule(
        attnkit.dilated_window(size, dilation),
        lambda b, h, q, k: any(k == q - step * dilation for step in range(size)),
    )


def strided(stride: int) -> Rule:
    return Rule(attnkit.strided(stride), lambda b, h, q, k: k <= q and (k >= q - stride or (q - k) % stride == 0))


def fixed(stride: int, columns: int) -> Rule:
    return Rule(
        attnkit.fixed(stride, columns),
        lambda b, h, q, k: k <= q and (q // stride == k // stride or k % stride >= stride - columns),
    )


def chunked(chunk: int) -> Rule:
    return Rule(attnkit.chunked(chunk), lambda b, h, q, k: q // chunk == k // chunk)


def prefix(length: int) -> Rule:
    return Rule(attnkit.prefix(length), lambda b, h, q, k: k <= q or k < length)


def global_tokens(positions: list[int]) -> Rule:
    return Rule(attnkit.global_tokens(positions), lambda b, h, q, k: q in positions or k in positions)


def documents(ids: list[list[int]]) -> Rule:
    def sees(b: int, h: int, q: int, k: int) -> bool:
        row = ids[b if len(ids) > 1 else 0]
        return row[q] == row[k]

    return Rule(attnkit.documents(torch.tensor(ids)), sees)


def padding(keep: list[list[bool]]) -> Rule:
    return Rule(attnkit.padding(torch.tensor(keep)), lambda b, h, q, k: keep[b if len(keep) > 1 else 0][k])


def block_sparse(layout: list[list[list[bool]]], block: int) -> Rule:
    return Rule(
        attnkit.block_sparse(torch.tensor(layout), block),
        lambda b, h, q, k: layout[h if len(layout) > 1 else 0][q // block][k // block],
    )


def explicit(keep: list[list[list[list[bool]]]]) -> Rule:
    m, n = len(keep[0][0]), len(keep[0][0][0])
    return Rule(
        attnkit.explicit(torch.tensor(keep)),
        lambda b, h, q, k: keep[b if len(keep) > 1 else 0][h if len(keep[0]) > 1 else 0][q - (n - m)][k],
    )


def predicate(modulus: int, heads: int) -> Rule:
    by_head = int(heads > 1)
    return Rule(
        attnkit.predicate(lambda b, h, q, k: (q + 2 * k + h * by_head) % modulus != 0, heads=heads),
        lambda b, h, q, k: (q + 2 * k + h * by_head) % modulus != 0,
    )


def _coins(rng: random.Random, *shape: int) -> Any:
    if len(shape) == 1:
        return [rng.random() < 0.6 for _ in range(shape[0])]
    return [_coins(rng, *shape[1:]) for _ in range(shape[0])]


def _documents(rng: random.Random, b: int, h: int, m: int, n: int) -> Rule:
    return documents([sorted(rng.randrange(4) for _ in range(n)) for _ in range(rng.choice((1, b)))])


def _block_sparse(rng: random.Random, b: int, h: int, m: int, n: int) -> Rule:
    block = rng.choice((1, 3, 16, 64))
    blocks = -(-n // block)
    return block_sparse(_coins(rng, rng.choice((1, h)), blocks, blocks), block)


KINDS: dict[str, Callable[[random.Random, int, int, int, int], Rule]] = {
    "full": lambda rng, b, h, m, n: full(),
    "causal": lambda rng, b, h, m, n: causal(),
    "window": lambda rng, b, h, m, n: window(rng.randint(1, n + 1)),
    "symmetric_window": lambda rng, b, h, m, n: symmetric_window(rng.randint(0, n)),
    "dilated_window": lambda rng, b, h, m, n: dilated_window(rng.randint(1, 9), rng.randint(1, 5)),
    "strided": lambda rng, b, h, m, n: strided(rng.randint(1, 12)),
    "fixed": lambda rng, b, h, m, n: fixed(stride := rng.randint(1, 12), rng.randint(1, stride)),
    "chunked": lambda rng, b, h, m, n: chunked(rng.randint(1, n + 1)),
    "prefix": lambda rng, b, h, m, n: prefix(rng.randint(0, n)),
    "global_tokens": lambda rng, b, h, m, n: global_tokens(sorted({rng.randrange(n) for _ in range(3)})),
    "documents": _documents,
    "padding": lambda rng, b, h, m, n: padding(_coins(rng, rng.choice((1, b)), n)),
    "block_sparse": _block_sparse,
    "explicit": lambda rng, b, h, m, n: explicit(_coins(rng, rng.choice((1, b)), rng.choice((1, h)), m, n)),
    "predicate": lambda rng, b, h, m, n: predicate(rng.randint(2, 5), rng.choice((1, h))),
}
WITHIN = ("documents", "block_sparse")
