"""The keys and values that a policy keeps, each with its position in the text, in buffers that never grow."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from attnkit.state.policies.base import Evicting, Seen, checked_limit, checked_queries, taken, wide
from attnkit.state.policies.streaming import StreamingLLM
from attnkit.state.tokens import check_new_tokens
from attnkit.state.view import View


class KeptState:
    """At most ``policy.budget`` tokens of each sequence and KV head; which ones, heads decide for themselves.

    New tokens attend to all that was kept before them and causally to each other; what is too much leaves afterwards.
    So there is a slot more than the budget, and a prompt as a whole sees itself as a whole. Until the budget is reached
    results have the bits of a ``KVState``. Attention here is causal and knows no distances but those of rotary keys:
    windows, ALiBi and T5's bias need another state.

    Parameters
    ----------
    policy: what to keep; ``policy.state(...)`` makes this state.
    batch, heads, key_size, value_size, dtype, device: as those of ``KVState``.
    capacity: tokens a sequence may reach; an append past it is refused. It costs nothing beyond the budget.
    limit: bytes that the state may take.
    """

    def __init__(
        self,
        policy: Evicting,
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
        value_size = key_size if value_size is None else value_size
        if min(batch, heads, capacity, key_size, value_size) < 1:
            raise ValueError(
                f"KeptState got batch {batch}, heads {heads}, capacity {capacity} and sizes {key_size} and "
                f"{value_size}, expected >= 1 of each"
            )
        slots = min(policy.budget + 1, capacity)
        each = (key_size + value_size) * dtype.itemsize + 8 + max(4, dtype.itemsize) * policy.totals
        streams = isinstance(policy, StreamingLLM) and policy.rotary is not None
        unturned = policy.sinks if isinstance(policy, StreamingLLM) and streams else 0
        checked_limit("KeptState", batch * heads * (slots * each + unturned * key_size * dtype.itemsize), limit)
        self.policy, self.capacity, self.length, self._held, self._limit = policy, capacity, 0, 0, limit
        # The length at which tokens last left: what left is not there to go back to.
        self._settled = 0
        shape = (batch, heads, slots)
        self._kept = {
            "k": torch.zeros(*shape, key_size, dtype=dtype, device=device),
            "v": torch.zeros(*shape, value_size, dtype=dtype, device=device),
            "positions": torch.zeros(shape, dtype=torch.int64, device=device),
        }
        if policy.totals:
            self._kept["totals"] = wide(torch.zeros(shape, dtype=dtype, device=device))
        self._sinks = torch.zeros(batch, heads, unturned, key_size, dtype=dtype, device=device) if streams else None
        self._recent: Tensor | None = None
        # Decided by an append and acted on when its view is no longer needed: the slots that stay (b, g, count), or the
        # one slot that does not (b, g, 1).
        self._stay: Tensor | None = None
        self._leaves: Tensor | None = None

    @property
    def batch(self) -> int:
        """Sequences."""
        return self._kept["k"].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, those of remembered queries included."""
        extra = (x.nbytes for x in (self._sinks, self._recent) if x is not None)
        return sum(x.nbytes for x in self._kept.values()) + sum(extra)

    @property
    def held(self) -> int:
        """Tokens kept of each sequence and head."""
        if self._stay is not None:
            return self._stay.shape[2]
        return self._held - (self._leaves is not None)

    @property
    def positions(self) -> Tensor:
        """Where the kept tokens stand in the text: int64 (b, g, held)."""
        self._settle()
        return self._kept["positions"][:, :, : self._held]

    def append(self, k: Tensor, v: Tensor, q: Tensor, *, scale: float | None = None) -> View:
        """Take ``m`` new tokens, and return the keys and values that they attend to, those about to leave included.

        Apply ``attnkit.causal()`` to the view's keys by their index: what was kept comes first, the new tokens last.
        The view is valid until the next append.

        Parameters
        ----------
        k: (b, g, m, d). v: (b, g, m, e). q: (b, h, m, d), the new tokens' queries, turned like the keys.
        scale: of the logits; ``d ** -0.5`` when None.
        """
        self._settle()
        kept, old = self._kept, self._held
        m = check_new_tokens("KeptState.append", {"k": k, "v": v}, {"k": kept["k"], "v": kept["v"]})
        checked_queries("KeptState.append", q, k)
        if self.length + m > self.capacity:
            raise ValueError(
                f"KeptState.append: has taken {self.length} of {self.capacity} tokens and got {m} more: make the state "
                f"with a capacity of at least {self.length + m}"
            )
        self._remember(q)
        n, slots = old + m, kept["k"].shape[2]
        positions = torch.arange(self.length, self.length + m, device=k.device).expand(*k.shape[:3])
        new = {"k": k, "v": v, "positions": positions}
        if "totals" in kept:
            new["totals"] = kept["totals"].new_zeros(positions.shape)
        if n <= slots:
            for name, x in new.items():
                kept[name][:, :, old:n] = x
            all_ = {name: x[:, :, :n] for name, x in kept.items()}
        elif old == 0:
            all_ = new
        else:
            all_ = {name: torch.cat([x[:, :, :old], new[name]], 2) for name, x in kept.items()}
        self._hold_sinks(new)
        self.length += m
        scale = k.shape[3] ** -0.5 if scale is None else scale
        policy = self.policy
        self._turn_sinks(all_, n)
        seen = Seen(q, all_["k"], all_["positions"], scale, self.length, all_.get("totals"), self._recent)
        policy.watch(seen)
        self._held = n
        if n > policy.budget:
            count = policy.budget if m > 1 else policy.budget - policy.every + 1
            score, self._settled = policy.score(seen).nan_to_num(torch.inf, torch.inf, -torch.inf), self.length
            if n == count + 1 <= slots and not policy.ordered:
                self._leaves = _lowest(score, all_["positions"])
            elif n <= slots:
                self._stay = _highest(score, all_["positions"], count)
            else:
                stay = _highest(score, all_["positions"], count)
                for name, x in all_.items():
                    kept[name][:, :, :count] = taken(x, stay)
                self._held = count
        return View(all_["k"], all_["v"], n)

    def view(self) -> View:
        """The keys and values kept, in any order: see ``positions``."""
        self._settle()
        return View(self._kept["k"][:, :, : self._held], self._kept["v"][:, :, : self._held], self._held)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; refused where tokens left since, or were added up."""
        if not 0 <= length <= self.length:
            raise ValueError(f"KeptState.crop: length is {length}, expected 0 to {self.length}, the tokens appended")
        if length == self.length:
            return
        name = type(self.policy).__name__
        if self.policy.totals or self.policy.window:
            raise ValueError(
                f"KeptState.crop: cannot go back from {self.length} to {length} tokens, {name} remembers what later "
                f"queries looked at: fork before drafting and go on from the fork"
            )
        if length < self._settled:
            raise ValueError(
                f"KeptState.crop: cannot go back from {self.length} to {length} tokens, {name} let go of some at "
                f"{self._settled}: fork before drafting and go on from the fork"
            )
        # Since then tokens were only added behind those that stayed.
        self._settle()
        self._held -= self.length - length
        self.length = length

    def fork(self) -> Self:
        """An independent copy."""
        return self.select(torch.arange(self.batch))

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        self._settle()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        rows = rows.to(self._kept["k"].device)
        other._kept = {name: x.index_select(0, rows) for name, x in self._kept.items()}
        for name in ("_sinks", "_recent"):
            x = getattr(self, name)
            setattr(other, name, None if x is None else x.index_select(0, rows))
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        positions = self.positions
        assert 0 <= self._held <= min(self.policy.budget, self.length) and self._settled <= self.length
        ordered = positions.sort(-1).values
        assert (ordered.diff(dim=-1) > 0).all() and (positions >= 0).all() and (positions < self.length).all()

    def _settle(self) -> None:
        """Let the tokens go that an append decided to let go."""
        if self._stay is not None:
            count = self._stay.shape[2]
            for x in self._kept.values():
                x[:, :, :count] = taken(x, self._stay)
            self._held, self._stay = count, None
        if self._leaves is not None:  # the newest moves to where it was
            self._held -= 1
            slots = self._kept["k"].shape[2]
            rows = torch.arange(0, self._leaves.numel() * slots, slots, device=self._leaves.device)
            for x in self._kept.values():
                x.flatten(0, 2).index_copy_(0, rows + self._leaves.flatten(), x[:, :, self._held].flatten(0, 1))
            self._leaves = None

    def _remember(self, q: Tensor) -> None:
        if self.policy.window:
            recent = q if self._recent is None else torch.cat([self._recent, q], 2)
            recent = recent[:, :, -self.policy.window :]
            if self._recent is None or recent.shape != self._recent.shape:
                have = self.nbytes - (0 if self._recent is None else self._recent.nbytes)
                checked_limit("KeptState.append", have + recent.numel() * recent.itemsize, self._limit)
            self._recent = recent.clone()

    def _hold_sinks(self, new: dict[str, Tensor]) -> None:
        """Keep sinks as they came, to turn them from there and round once."""
        if self._sinks is not None and self.length < self._sinks.shape[2]:
            part = new["k"][:, :, : self._sinks.shape[2] - self.length]
            self._sinks[:, :, self.length : self.length + part.shape[2]] = part

    def _turn_sinks(self, all_: dict[str, Tensor], n: int) -> None:
        """Let the sinks stand as far before the newest token as their slots say."""
        if self._sinks is not None and (shift := self.length - n):
            assert isinstance(self.policy, StreamingLLM)
            all_["k"][:, :, : self._sinks.shape[2]] = self.policy.turned(self._sinks, shift)


def _highest(score: Tensor, positions: Tensor, count: int) -> Tensor:
    """Slots (b, g, count) of the highest scores, the newer among equals, in the order of the text."""
    newest_first = positions.argsort(-1, descending=True)
    best_first = score.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    chosen = newest_first.gather(-1, best_first[..., :count])
    return chosen.gather(-1, positions.gather(-1, chosen).argsort(-1))


def _lowest(score: Tensor, positions: Tensor) -> Tensor:
    """The slot (b, g, 1) of the lowest score, the older among equals."""
    equal = score == score.amin(-1, keepdim=True)
    return positions.masked_fill(~equal, torch.iinfo(torch.int64).max).argmin(-1, keepdim=True)
