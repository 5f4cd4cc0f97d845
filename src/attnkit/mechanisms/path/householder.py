"""Products of the reflections ``H_t = I - beta_t w_t w_t^T`` of a run of tokens, without a d x d matrix a token.

For rows ``W`` of one run and ``B = diag(beta)``, with ``T = (I + strict_lower(B W W^T))^-1 B`` (the UT transform),
``H_last ... H_first = I - W^T T W``. See ``page.md`` for the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this beta |w|^2 a step is a reflection, or less than one; the margin is for w normalised in bfloat16.
LARGEST = 2.1


@dataclass(frozen=True)
class Run:
    """Keys and reflections of one run of ``s`` tokens; leading dimensions are anything.

    ``k`` and ``w`` are (..., s, d). ``t`` (..., s, s) is the UT transform, and ``x`` (..., s, s) is
    T strict_lower(W K^T), what the run's own reflections take off the products with its own keys.
    """

    k: Tensor
    w: Tensor
    t: Tensor
    x: Tensor

    @classmethod
    def of(cls, k: Tensor, w: Tensor, beta: Tensor) -> Run:
        """The run of keys ``k`` and directions ``w`` (..., s, d) with strengths ``beta`` (..., s)."""
        system = (beta[..., None] * (w @ w.mT)).tril(-1)  # its unit diagonal is implied
        t = torch.linalg.solve_triangular(system, torch.diag_embed(beta), upper=False, unitriangular=True)
        return cls(k, w, t, t @ (w @ k.mT).tril(-1))

    def local(self, q: Tensor, past: int = 0) -> tuple[Tensor, Tensor]:
        """Products (..., m, s) of the run's own queries and keys, and the queries moved back to the run's start.

        The queries ``q`` (..., m, d) are those of the tokens from ``past`` on. Products with later keys mean nothing.
        """
        reached = (q @ self.w.mT).tril(past)
        return q @ self.k.mT - reached @ self.x, q - reached @ self.t @ self.w

    def moved(self) -> Tensor:
        """The run's keys (..., s, d), moved to its end: each by the reflections after its own."""
        return self.k - self.x.mT @ self.w

    def product(self) -> Tensor:
        """``M`` (..., d, d) with ``I - M`` the product of all reflections: rows ``q - q M`` move over the whole run."""
        return self.w.mT @ self.t @ self.w

    def move(self, keys: Tensor) -> Tensor:
        """Keys (..., n, d) from before the run, moved to its end."""
        return keys - (keys @ self.w.mT) @ self.t.mT @ self.w


def lawful(w: Tensor, beta: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``w`` and ``beta`` in ``work``, with 0 for steps that are not reflections, and NaN (b, g, n) from the first on.

    A product of such steps grows without bound, and its overflow must not reach the rows before it as ``0 x inf``.
    """
    w, beta = w.to(work), beta.to(work)
    strength = (beta * w.square().sum(-1)).detach()
    good = (strength >= 0) & (strength <= LARGEST) & (beta >= 0)
    spoiled = torch.where((~good).cumsum(-1) > 0, torch.nan, 0.0).to(work)
    return torch.where(good[..., None], w, 0.0), torch.where(good, beta, 0.0), spoiled
