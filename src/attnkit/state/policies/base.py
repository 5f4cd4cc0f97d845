"""The one interface of the policies: what they look at, what they say, and the weights that most of them judge by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from attnkit import shapes

_AT_ONCE = 1 << 22  # weights held at once: 16 MB of float32


@dataclass(frozen=True)
class Seen:
    """What a policy judges by: the newest queries, and the keys there are, those of the newest tokens last.

    ``q`` (b, h, m, d), ``k`` (b, g, n, d), ``positions`` int64 (b, g, n) of the keys in the text, ``scale`` of the
    logits. ``length`` is the number of tokens of the sequence so far. ``totals`` (b, g, n) is what a policy adds up for
    each key, if it does; ``recent`` (b, h, w, d) are the last queries, if it asks for them.
    """

    q: Tensor
    k: Tensor
    positions: Tensor
    scale: float
    length: int
    totals: Tensor | None = None
    recent: Tensor | None = None

    def weights(self, q: Tensor) -> Tensor:
        """Softmax weights (b, h, w, n) of the last ``w`` queries; each sees no later key than its own."""
        b, h, w, _ = q.shape
        g, n = self.k.shape[1:3]
        rows = (wide(q) * self.scale).reshape(b, g, -1, q.shape[3])
        logits = (rows @ wide(self.k).mT).reshape(b, h, w, n)
        if w > 1:
            later = torch.arange(n, device=q.device) > torch.arange(n - w, n, device=q.device)[:, None]
            logits.masked_fill_(later, -torch.inf)
        return logits.softmax(-1)

    def received(self) -> Tensor:
        """Weight that each key got from all the newest queries, per KV head the mean of its heads: (b, g, n)."""
        b, h, m, _ = self.q.shape
        g, n = self.k.shape[1:3]
        total = wide(self.k.new_zeros(b, g, n))
        rows = max(1, _AT_ONCE // max(1, b * h * n))
        for start in range(0, m, rows):
            end = min(m, start + rows)
            # Rows of a block see keys up to their own: the last of the block is the last of a shorter context.
            upto = n - (m - end)
            part = Seen(self.q, self.k[:, :, :upto], self.positions, self.scale, self.length)
            total[..., :upto] += per_group(part.weights(self.q[:, :, start:end]).sum(2), g)
        return total


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_group(x: Tensor, groups: int) -> Tensor:
    """The mean over the query heads (axis 1) of each KV head."""
    b, h = x.shape[:2]
    return x.reshape(b, groups, h // groups, *x.shape[2:]).mean(2)


@dataclass(frozen=True)
class Policy:
    """What is attended to of a long context, without training. ``score`` says how much each candidate matters."""

    def score(self, seen: Seen) -> Tensor:
        """How much each candidate matters, the more the higher; what a candidate is, each policy says."""
        raise NotImplementedError

    def for_layer(self, layer: int, layers: int) -> Policy | None:
        """The policy of one layer of a model; None where it wants a whole cache."""
        return self

    def state(
        self,
        batch: int,
        heads: int,
        capacity: int,
        key_size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ) -> Any:
        """An empty state under this policy; arguments as those of ``KVState``.

        ``limit`` is the number of bytes it may take: more is refused before anything is allocated.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Evicting(Policy):
    """Keeps at most ``budget`` tokens of each KV head; the rest is gone. Candidates are tokens: ``score`` (b, g, n).

    A token at infinity stays. Among equals the newer stays. ``every`` tokens leave together while decoding, which costs
    less than one by one and means that between ``budget - every + 1`` and ``budget`` are there.
    """

    budget: int
    every: int = field(default=1, kw_only=True)

    totals = False
    """Whether ``Seen.totals`` is kept, which ``watch`` adds to."""
    window = 0
    """Queries of ``Seen.recent``."""
    ordered = False
    """Whether ``score`` wants keys in the order of the text; otherwise the old ones may come in any order."""

    def __post_init__(self) -> None:
        if self.budget < 1 or not 1 <= self.every <= self.budget:
            raise ValueError(
                f"{type(self).__name__}: budget is {self.budget} and every {self.every}, expected 1 <= every <= budget"
            )

    def watch(self, seen: Seen) -> None:
        """Called with every append, before ``score`` if that is called at all."""

    def state(
        self,
        batch: int,
        heads: int,
        capacity: int,
        key_size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ) -> Any:
        from attnkit.state.policies.kept import KeptState

        return KeptState(self, batch, heads, capacity, key_size, value_size, dtype=dtype, device=device, limit=limit)

    def within(
        self, limit: int, batch: int, heads: int, key_size: int, value_size: int, *, dtype: torch.dtype = torch.float32
    ) -> Self:
        """This policy with the largest budget whose state takes ``limit`` bytes, remembered queries apart."""

        def nbytes(budget: int) -> int:
            policy = replace(self, budget=budget)
            made = policy.state(batch, heads, budget + 1, key_size, value_size, dtype=dtype, device="meta")
            return int(made.nbytes)

        each = nbytes(self.budget + 1) - nbytes(self.budget)
        budget = self.budget + (limit - nbytes(self.budget)) // each
        if budget < 1:
            raise ValueError(f"{type(self).__name__}: the limit is {limit} bytes and one token takes {each}")
        return replace(self, budget=budget)


def taken(x: Tensor, slots: Tensor) -> Tensor:
    """The rows ``slots`` (b, g, count) of ``x`` (b, g, n) or (b, g, n, size)."""
    if x.dim() == 3:
        return x.gather(2, slots)
    b, g, n, size = x.shape
    # Whole rows are copied at once, where gather would go number by number.
    rows = slots + n * torch.arange(b * g, device=x.device).reshape(b, g, 1)
    return x.reshape(-1, size).index_select(0, rows.flatten()).reshape(b, g, -1, size)


def checked_queries(where: str, q: Tensor, k: Tensor) -> None:
    """Raise unless ``q`` (b, h, m, d) are queries of the same tokens as the keys ``k`` (b, g, m, d)."""
    sizes = shapes.check(where, q=(q, "b h m d"), k=(k, "b g m d"))
    shapes.check_same(where, q=q, k=k)
    shapes.check_groups(where, sizes["h"], sizes["g"])


def checked_limit(where: str, nbytes: int, limit: int | None) -> None:
    """Raise ``ValueError`` when ``nbytes`` is more than ``limit``."""
    if limit is not None and nbytes > limit:
        raise ValueError(f"{where}: takes {nbytes} bytes and the limit is {limit}: keep fewer tokens")
