"""Generated tasks on which mechanisms really differ: recall of pairs, copying, needles in a haystack.

One vocabulary serves them all: a token that names the task, keys, values, and noise that means nothing. A sequence
states facts and then asks for them; only the answers count. All tasks are asked of one model trained on a mixture: what
they need (look for an earlier occurrence, read what follows it) is one skill, and learning it once is cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

KEYS, VALUES, NOISE = 64, 64, 16
_RECALL, _COPY, _NEEDLE, _AGAIN = range(4)
_FIRST_KEY = 4
_FIRST_VALUE = _FIRST_KEY + KEYS
_FIRST_NOISE = _FIRST_VALUE + VALUES
VOCABULARY = _FIRST_NOISE + NOISE
NOT_ASKED = -100
"""Target where the answer does not count: what ``cross_entropy`` ignores."""
NEEDLES = 4
"""Facts hidden in a haystack; all are asked for."""


@dataclass(frozen=True)
class Batch:
    """Sequences to read and what should follow each token.

    tokens: (b, n) int64. targets: (b, n) int64, ``NOT_ASKED`` where it does not count.
    """

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Exam:
    """One question of one size: ``length`` tokens, with ``pairs`` facts to recall or tokens to copy."""

    task: str
    length: int
    pairs: int

    def __post_init__(self) -> None:
        if self.task not in _GENERATORS:
            raise ValueError(f"Exam: task is {self.task!r}, expected one of {', '.join(_GENERATORS)}")
        most = KEYS + VALUES if self.task == "copy" else KEYS
        if not 1 <= self.pairs <= most:
            raise ValueError(f"Exam: {self.task} has {self.pairs} pairs, expected 1 to {most}")
        shortest = 2 * self.pairs + 2 if self.task == "copy" else 4 * self.pairs
        if self.length < shortest:
            raise ValueError(
                f"Exam: {self.task} has length {self.length}, expected at least {shortest} for {self.pairs} pairs"
            )

    @property
    def chance(self) -> float:
        """Accuracy of a model that guesses among the answers it has seen in the sequence."""
        return 1 / self.pairs

    def batch(self, generator: torch.Generator, rows: int) -> Batch:
        return _GENERATORS[self.task](generator, rows, self.length, self.pairs)


def recall(generator: torch.Generator, rows: int, length: int, pairs: int, *, asked: int | None = None) -> Batch:
    """Multi-query associative recall (MQAR, arXiv 2312.04927): ``k1 v1 k2 v2 .. noise .. k7 -> v7, k3 -> v3 ..``.

    Every pair is asked for once, at the end, in random order. In training ``asked`` may be larger: more questions, each
    key again and again.
    """
    asked = pairs if asked is None else asked
    keys, values = _facts(generator, rows, pairs)
    text = _noise(generator, rows, length + 1)
    text[:, 0] = _RECALL
    text[:, 1 : 1 + 2 * pairs] = torch.stack([keys, values], 2).flatten(1)
    rounds = [_permutations(generator, rows, pairs) for _ in range(-(-asked // pairs))]
    return _ask(text, keys, values, torch.cat(rounds, 1)[:, :asked])


def needle(generator: torch.Generator, rows: int, length: int, pairs: int) -> Batch:
    """Pairs hidden anywhere in a haystack of noise; all are asked for at the end."""
    keys, values = _facts(generator, rows, pairs)
    text = _noise(generator, rows, length + 1)
    text[:, 0] = _NEEDLE
    cells = (length - 2 * pairs) // 2
    places = 1 + 2 * _permutations(generator, rows, cells)[:, :pairs]
    text.scatter_(1, places, keys)
    text.scatter_(1, places + 1, values)
    return _ask(text, keys, values, _permutations(generator, rows, pairs))


def copy(generator: torch.Generator, rows: int, length: int, pairs: int) -> Batch:
    """``pairs`` different tokens, then the same again, as often as ``length`` holds them; noise before the first."""
    piece = _FIRST_KEY + _permutations(generator, rows, KEYS + VALUES)[:, :pairs]
    piece = torch.cat([torch.full((rows, 1), _AGAIN), piece], 1)
    times = length // (pairs + 1)
    text = _noise(generator, rows, length + 1)
    text[:, 0] = _COPY
    start = length + 1 - times * (pairs + 1)
    text[:, start:] = piece.repeat(1, times)
    # Within a repetition, every token but the mark that opens it can be known from the one before.
    place = torch.arange(length + 1) - start
    known = (place > pairs) & (place % (pairs + 1) != 0)
    return _batch(text, known)


_GENERATORS = {"recall": recall, "copy": copy, "needle": needle}


def lesson(generator: torch.Generator, rows: int, length: int, pairs: int) -> Batch:
    """A training batch of up to ``pairs`` pairs: half recall in two sizes, a quarter copying, a quarter needles."""
    most = min(pairs, length // 4)
    quarter = rows // 4
    parts = []
    for _ in range(2):
        # Powers of two, so that few and many pairs, near and far ones are practised alike.
        few = 1 << _draw(generator, 0, most.bit_length() - 1)
        room = (length - 2 * few) // 2
        asked = few << _draw(generator, 0, (room // few).bit_length() - 1)
        parts.append(recall(generator, quarter, length, few, asked=asked))
    parts.append(copy(generator, quarter, length, _draw(generator, 4, min(length // 2 - 1, KEYS + VALUES))))
    parts.append(needle(generator, rows - 3 * quarter, length, min(NEEDLES, most)))
    return Batch(torch.cat([part.tokens for part in parts]), torch.cat([part.targets for part in parts]))


def lessons(rows: int, length: int, pairs: int, seed: int) -> Iterator[Batch]:
    """Training batches without end; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield lesson(generator, rows, length, pairs)


def _facts(generator: torch.Generator, rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Distinct keys and any values, ``(rows, pairs)`` each."""
    keys = _FIRST_KEY + _permutations(generator, rows, KEYS)[:, :pairs]
    return keys, torch.randint(_FIRST_VALUE, _FIRST_NOISE, (rows, pairs), generator=generator)


def _ask(text: Tensor, keys: Tensor, values: Tensor, order: Tensor) -> Batch:
    """End ``text`` with the keys in ``order``, each followed by its value, which counts."""
    first = text.shape[1] - 2 * order.shape[1]
    text[:, first::2] = keys.gather(1, order)
    text[:, first + 1 :: 2] = values.gather(1, order)
    place = torch.arange(text.shape[1]) - first
    return _batch(text, (place > 0) & (place % 2 == 1))


def _batch(text: Tensor, counts: Tensor) -> Batch:
    """Inputs and targets of ``text`` ``(b, n + 1)``, whose tokens count where ``counts`` ``(n + 1,)``."""
    return Batch(text[:, :-1], text.masked_fill(~counts, NOT_ASKED)[:, 1:])


def _noise(generator: torch.Generator, rows: int, length: int) -> Tensor:
    return torch.randint(_FIRST_NOISE, VOCABULARY, (rows, length), generator=generator)


def _permutations(generator: torch.Generator, rows: int, count: int) -> Tensor:
    return torch.rand(rows, count, generator=generator).argsort(1)


def _draw(generator: torch.Generator, lowest: int, highest: int) -> int:
    return int(torch.randint(lowest, highest + 1, (), generator=generator))
