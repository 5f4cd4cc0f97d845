"""A run of neighbouring blocks: their tables all at once, then the walk of the state through them, there and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.costs import DELTA_BLOCK as BLOCK
from attnkit.mechanisms.delta.pairs import Pairs, pairs, slopes


class Tokens(NamedTuple):
    """A whole call: the arguments of ``delta_attention``, and ``spoiled`` bool (b, h, n), tokens that do not count."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    spoiled: Tensor
    scale: float


class Run(NamedTuple):
    """Tensors (b, h, c, s, ...): ``c`` blocks of ``s`` tokens, filled up with tokens that change nothing.

    ``early_q`` and ``early_k`` are decayed from the block's start, ``late_k`` to its end, ``fades`` over all of it.
    ``keys`` has the decayed products of each key with those before it, ``reads`` those of each query with the keys up
    to its own. Where a head has one decay for all ``channels``, ``made`` has the decays alone, of one channel.
    """

    length: int
    groups: int
    channels: bool
    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    made: Pairs
    keys: Tensor
    reads: Tensor
    early_q: Tensor
    early_k: Tensor
    late_k: Tensor
    fades: Tensor

    @classmethod
    def of(cls, tokens: Tokens, start: int, end: int, block: int = BLOCK) -> Run:
        """Tokens ``start`` to ``end`` of a call, in blocks of ``block``, a power of 2, or in one that is shorter."""
        h, length = tokens.q.shape[1], end - start
        work = torch.promote_types(tokens.q.dtype, torch.float32)
        size = min(block, 1 << (length - 1).bit_length())
        spoiled = tokens.spoiled[:, :, start:end, None]

        def cut(x: Tensor, clean: bool = True) -> Tensor:
            x = x[:, :, start:end].to(work)
            if x.shape[1] != h:
                x = x.repeat_interleave(h // x.shape[1], 1)
            x = torch.where(spoiled, 0.0, x) if clean else x
            blocks: Tensor = pad(x, (0, 0, 0, -length % size)).unflatten(2, (-1, size))
            return blocks

        q, k, v = cut(tokens.q, clean=False) * tokens.scale, cut(tokens.k), cut(tokens.v)
        beta = cut(tokens.beta[..., None])
        if tokens.log_decay is None:
            channels, falls = False, torch.zeros_like(beta)
        else:
            channels = tokens.log_decay.dim() == 4
            falls = cut(tokens.log_decay if channels else tokens.log_decay[..., None])
        if channels:
            made = pairs(torch.stack([k, q]), k, falls)
            keys, reads = made.table
        else:
            one = torch.ones_like(beta)
            made = pairs(one[None], one, falls)
            keys, reads = made.table[0] * (k @ k.mT), made.table[0] * (q @ k.mT)
        early, late = made.prefix.exp(), made.suffix.exp()
        fades = early[..., -1, :, None]
        groups = tokens.k.shape[1]
        decayed = q * early, k * early, k * late, fades
        return cls(length, groups, channels, tokens.scale, q, k, v, beta, made, keys, reads, *decayed)

    def walk(self, state: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Results (b, h, m, e) and the state after the run; for each block the state before it, what is off, added."""
        rows, steps = [], []
        systems = self.beta * self.keys
        for i in range(self.q.shape[2]):
            off = self.v[:, :, i] - self.early_k[:, :, i] @ state
            added = _solved(systems[:, :, i], self.beta[:, :, i] * off, upper=False)
            rows.append(self.early_q[:, :, i] @ state + self.reads[:, :, i] @ added)
            steps.append((state, off, added))
            state = self.fades[:, :, i] * state + self.late_k[:, :, i].mT @ added
        return self._tokens(torch.stack(rows, 2)), state, steps

    def walk_back(self, state: Tensor, d_o: Tensor, d_state: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, beta, log_decay, and of the state before the run.

        ``state`` is that state, ``d_o`` (b, h, m, e) the gradient of the results, ``d_state`` that of the state after.
        """
        size = self.q.shape[3]
        d_o = pad(d_o.to(state.dtype), (0, 0, 0, -self.length % size)).unflatten(2, (-1, size))
        systems, found = self.beta * self.keys, []
        for i, (before, off, added) in reversed(list(enumerate(self.walk(state)[2]))):
            early_q, early_k, late_k = self.early_q[:, :, i], self.early_k[:, :, i], self.late_k[:, :, i]
            d_added = self.reads[:, :, i].mT @ d_o[:, :, i] + late_k @ d_state
            d_side = _solved(systems[:, :, i].mT, d_added, upper=True)
            d_off = self.beta[:, :, i] * d_side
            found.append(
                (
                    d_o[:, :, i] @ before.mT,  # of early_q
                    -(d_off @ before.mT),  # of early_k
                    added @ d_state.mT,  # of late_k
                    (d_state * before).sum(-1),  # of fades
                    d_off,  # of v
                    (d_side * off).sum(-1, keepdim=True),  # of beta, but for its part in the system
                    -(d_side @ added.mT).tril(-1),  # of the system
                    d_o[:, :, i] @ added.mT,  # of reads
                )
            )
            d_state = self.fades[:, :, i] * d_state + early_q.mT @ d_o[:, :, i] - early_k.mT @ d_off
        d_early_q, d_early_k, d_late_k, d_fades, d_v, d_beta, d_system, d_reads = (
            torch.stack(parts[::-1], 2) for parts in zip(*found, strict=True)
        )
        d_beta = d_beta + (d_system * self.keys).sum(-1, keepdim=True)
        d_prefix = d_early_q * self.early_q + d_early_k * self.early_k
        d_prefix[..., -1, :] += d_fades * self.fades[..., 0]
        d_suffix = d_late_k * self.late_k
        early, late = self.made.prefix.exp(), self.made.suffix.exp()
        d_q, d_k, d_falls = self._through_tables(self.beta * d_system, d_reads, d_prefix, d_suffix)
        d_q, d_k = d_q + d_early_q * early, d_k + d_early_k * early + d_late_k * late
        d_q, d_k, d_v, d_beta, d_falls = (self._tokens(x) for x in (d_q, d_k, d_v, d_beta, d_falls))
        d_k = d_k.unflatten(1, (self.groups, -1)).sum(2)
        return d_q * self.scale, d_k, d_v, d_beta[..., 0], d_falls if self.channels else d_falls[..., 0], d_state

    def _through_tables(
        self, d_keys: Tensor, d_reads: Tensor, d_prefix: Tensor, d_suffix: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q and k for those of the two tables, and of the log decays for all there are."""
        q, k = self.q, self.k
        if self.channels:
            d_table = torch.stack([d_keys, d_reads])
            (d_k, d_q), d_column, d_falls = slopes(self.made, torch.stack([k, q]), k, d_table, d_prefix, d_suffix)
            return d_q, d_k + d_column, d_falls
        one, decays = torch.ones_like(self.beta), self.made.table[0]
        d_decays = d_keys * (k @ k.mT) + d_reads * (q @ k.mT)
        sums = d_prefix.sum(-1, keepdim=True), d_suffix.sum(-1, keepdim=True)
        d_falls = slopes(self.made, one[None], one, d_decays[None], *sums)[2]
        d_keys, d_reads = d_keys * decays, d_reads * decays
        return d_reads @ k, (d_keys + d_keys.mT) @ k + d_reads.mT @ q, d_falls

    def _tokens(self, x: Tensor) -> Tensor:
        """Blocks (b, h, c, s, any) as the run's tokens (b, h, m, any)."""
        return x.flatten(2, 3)[:, :, : self.length]


def _solved(system: Tensor, side: Tensor, *, upper: bool) -> Tensor:
    """``x`` with ``(I + system) x = side``; the diagonal of ``system`` and what is beyond it are not read."""
    solved: Tensor = torch.linalg.solve_triangular(system, side, upper=upper, unitriangular=True)
    return solved
