"""States that keep every token and attend to some of them: pages while decoding, a mask for a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from attnkit.masks import Mask, joined
from attnkit.state.kv import KVState
from attnkit.state.policies.base import Policy, Seen, checked_limit, checked_queries, taken
from attnkit.state.view import View

if TYPE_CHECKING:
    from attnkit.state.policies.prefill import Prefill
    from attnkit.state.policies.quest import Quest


@dataclass(frozen=True)
class ChosenView(View):
    """A view of which the newest queries see what ``mask`` lets through."""

    mask: Mask | None = None

    def for_queries(self, mask: Mask | None, m: int) -> tuple[View, Mask | None]:
        return super().for_queries(joined(mask, self.mask), m)


class _Whole:
    """A ``KVState`` under a policy; arguments as those of ``KVState``."""

    def __init__(
        self,
        policy: Policy,
        batch: int,
        heads: int,
        capacity: int,
        key_size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ) -> None:
        size = key_size if value_size is None else value_size
        checked_limit(type(self).__name__, batch * heads * capacity * (key_size + size) * dtype.itemsize, limit)
        self.whole = KVState(batch, heads, capacity, key_size, value_size, dtype=dtype, device=device)
        self.policy: Policy = policy

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.whole.layout.batch

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.whole.length

    @property
    def capacity(self) -> int:
        """Tokens a sequence may hold."""
        return self.whole.capacity

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.whole.nbytes

    def append(self, k: Tensor, v: Tensor, q: Tensor, *, scale: float | None = None) -> View:
        """Store ``m`` new tokens, and return the keys and values that their queries ``q`` (b, h, m, d) attend to.

        k: (b, g, m, d). v: (b, g, m, e). scale: of the logits; ``d ** -0.5`` when None. The new tokens are the view's
        last: ``view.for_queries(attnkit.causal(), m)`` gives the mask to apply.
        """
        checked_queries(f"{type(self).__name__}.append", q, k)
        return self.chosen(self.whole.append(k, v), q, k.shape[3] ** -0.5 if scale is None else scale)

    def chosen(self, view: View, q: Tensor, scale: float) -> View:
        """What of the view ``q`` attends to."""
        raise NotImplementedError

    def view(self) -> View:
        """All keys and values so far."""
        return self.whole.view()

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, as if the others had never been appended."""
        self.whole.crop(length)

    def fork(self) -> Self:
        """An independent copy."""
        return self.select(torch.arange(self.batch))

    def grown(self, capacity: int) -> Self:
        """A copy with room for ``capacity`` tokens."""
        return self._around(self.whole.grown(capacity))

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        return self._around(self.whole.select(rows))

    def _around(self, whole: KVState) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.whole = whole
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        self.whole.check()


class GuidedState(_Whole):
    """Every token; a prompt attends through the mask that the policy makes of its queries and keys."""

    policy: Prefill

    def chosen(self, view: View, q: Tensor, scale: float) -> View:
        if q.shape[2] == 1:
            return view
        return ChosenView(view.k, view.v, view.length, mask=self.policy.mask(q, view.k, scale))


class PagewiseState(_Whole):
    """Every token, and of each page the least and the greatest of each channel; a step reads the best pages."""

    policy: Quest

    def __init__(
        self,
        policy: Quest,
        batch: int,
        heads: int,
        capacity: int,
        key_size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ) -> None:
        pages = -(-capacity // policy.page)
        bounds = (batch, heads, 2, pages, key_size)
        size = key_size if value_size is None else value_size
        each = batch * heads * (capacity * (key_size + size) + pages * 2 * key_size) * dtype.itemsize
        checked_limit("PagewiseState", each, limit)
        super().__init__(policy, batch, heads, capacity, key_size, value_size, dtype=dtype, device=device)
        self.bounds = torch.zeros(bounds, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.whole.nbytes + self.bounds.nbytes

    def chosen(self, view: View, q: Tensor, scale: float) -> View:
        n, page, m = view.k.shape[2], self.policy.page, q.shape[2]
        self._bound(view.k, n - m)
        pages, count = -(-n // page), self.policy.budget // page
        if m > 1 or pages <= count:
            return view
        seen = Seen(q, self.bounds[:, :, :, :pages], torch.empty(0), scale, n)
        score = self.policy.score(seen)
        score[..., -1] = torch.inf
        best = score.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
        tokens = (best[..., None] * page + torch.arange(page, device=best.device)).flatten(-2)
        tokens = tokens[..., : count * page - (pages * page - n)]  # the newest page comes last and may not be full
        k, v = (taken(rows["numbers"], tokens) for rows in self.whole.rows)
        return View(k, v, tokens.shape[2])

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, as if the others had never been appended."""
        super().crop(length)
        self._bound(self.whole.view().k, length)

    def grown(self, capacity: int) -> Self:
        """A copy with room for ``capacity`` tokens."""
        other = super().grown(capacity)
        other.bounds = self.bounds.new_zeros(
            *self.bounds.shape[:3], -(-capacity // self.policy.page), self.bounds.shape[4]
        )
        other.bounds[:, :, :, : self.bounds.shape[3]] = self.bounds
        return other

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]``."""
        other = super().select(rows)
        other.bounds = self.bounds.index_select(0, rows.to(self.bounds.device))
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        super().check()
        k, page = self.whole.view().k, self.policy.page
        for index, keys in enumerate(k.split(page, 2) if k.shape[2] else ()):
            assert torch.equal(self.bounds[:, :, :, index], torch.stack(keys.aminmax(dim=2), 2))

    def _bound(self, k: Tensor, first: int) -> None:
        """Bounds of the pages of ``k`` (b, g, n, d), all tokens, from that of token ``first`` on."""
        page, start = self.policy.page, first // self.policy.page
        full = k.shape[2] // page
        if full > start:
            pages = k[:, :, start * page : full * page].unflatten(2, (-1, page))
            self.bounds[:, :, :, start:full] = torch.stack(pages.aminmax(dim=3), 2)
        if k.shape[2] % page:
            self.bounds[:, :, :, full] = torch.stack(k[:, :, full * page :].aminmax(dim=2), 2)
