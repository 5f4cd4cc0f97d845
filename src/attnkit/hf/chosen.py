"""A layer of a cache under a policy: what is kept or read depends on queries, which the attention function brings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.hf.carried import Carried
from attnkit.hf.layers import FullLayer
from attnkit.masks import Mask, causal
from attnkit.state.policies import Evicting, KeptState, Policy, PolicyState
from attnkit.state.view import View

_UNBOUNDED = (
    1 << 62
)  # tokens of a sequence whose length nobody said; a state that lets go of tokens has no room for them


class Waiting:
    """New tokens ``k`` and ``v`` of a state that takes them together with their queries."""

    def __init__(self, state: PolicyState, k: Tensor, v: Tensor) -> None:
        self.state, self.k, self.v, self.before = state, k, v, state.length

    def taken(self, q: Tensor, scale: float | None) -> tuple[View, Mask | None]:
        """Let the state have them, and return what ``q`` ``(b, h, m, d)`` attends to and the mask to apply."""
        if self.state.length != self.before:
            raise NotImplementedError(
                f"the cache handed on tokens to follow {self.before} others and holds {self.state.length} now: with a "
                "policy each layer attends once to what update returns, before the next update"
            )
        return self.state.append(self.k, self.v, q, scale=scale).for_queries(causal(), q.shape[2])


class CarriedTokens(Carried):
    """The keys or the values ``(b, g, n, size)`` of ``waiting`` tokens and of all before them, kept or not.

    Attributes
    ----------
    waiting: the new ones; the keys and the values of one update have the same one.
    which: 0 for keys and 1 for values.
    """

    waiting: Waiting
    which: int

    @staticmethod
    def __new__(cls, waiting: Waiting, which: int) -> CarriedTokens:
        new = (waiting.k, waiting.v)[which]
        b, g, m, size = new.shape
        made: CarriedTokens = torch.Tensor._make_wrapper_subclass(
            cls, (b, g, waiting.before + m, size), dtype=new.dtype, device=new.device
        )
        made.waiting, made.which = waiting, which
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # theirs has no types
        return f"CarriedTokens({self.waiting.state!r}, {'kv'[self.which]}, shape={tuple(self.shape)})"

    def again(self, device: Any) -> CarriedTokens:
        return CarriedTokens(self.waiting, self.which)

    def refuse(self, name: str, kwargs: dict[str, Any]) -> None:
        """Always: which numbers there are is not known before the queries are."""
        raise NotImplementedError(
            f"the model computes {name} with keys or values of a cache whose policy is {self.waiting.state.policy}, "
            "which needs their queries first: use attn_implementation='attnkit', or leave policy out"
        )


def waiting_of(key: Tensor, value: Tensor) -> Waiting | None:
    """The new tokens behind these keys and values, if a model hands on just what a layer with a policy returned."""
    if not (isinstance(key, CarriedTokens) and isinstance(value, CarriedTokens)):
        return None
    same = key.waiting is value.waiting and (key.which, value.which) == (0, 1)
    return key.waiting if same else None


def check_plain(mask: Mask | None, queries: int, others: dict[str, Any]) -> None:
    """Raise for a call that policies do not know: a key they kept is one of many, wherever it stands."""
    if given := [name for name, value in others.items() if value is not None]:
        raise NotImplementedError(
            f"the model has {' and '.join(given)}, which a policy does not take into account: leave policy out"
        )
    plain = queries == 1 if mask is None else mask.interval() == causal().interval()
    if not plain:
        raise NotImplementedError(
            f"the mask is {mask!r} and a policy keeps tokens of every row by their number, without padding or windows: "
            "give prompts of one length, or one prompt a call"
        )


class PolicyLayer(FullLayer):
    """What ``policy`` keeps of every token; what is handed on are the new ones, which wait for their queries."""

    state: PolicyState | None  # type: ignore[assignment]  # holds as a full layer's state does, and appends with queries

    def __init__(self, policy: Policy, dtype: torch.dtype | None = None, max_length: int | None = None) -> None:
        super().__init__(dtype, max_length)
        self.policy = policy

    def _made(self, capacity: int, k: Tensor, v: Tensor) -> Any:
        if isinstance(self.policy, Evicting):
            capacity = self.max_length or _UNBOUNDED
        b, g, _, d = k.shape
        return self.policy.state(b, g, capacity, d, v.shape[3], dtype=k.dtype, device=k.device)

    @property
    def _batch(self) -> int:
        return self.state.batch if self.state is not None else 0

    def _make_room(self, length: int) -> None:
        assert self.state is not None
        if length > self.state.capacity and not isinstance(self.state, KeptState):
            with torch.inference_mode(False):
                self.state = self.state.grown(max(length, 2 * self.state.capacity))

    def _store(self, k: Tensor, v: Tensor) -> None:
        """They wait."""

    def _seen(self, k: Tensor, v: Tensor, before: int) -> tuple[Tensor, Tensor]:
        assert self.state is not None
        waiting = Waiting(self.state, k, v)
        return CarriedTokens(waiting, 0), CarriedTokens(waiting, 1)

    def activate_past_recording(self) -> None:
        """Allow ``crop`` after each call: refused where tokens leave, because a guess may make the wrong ones leave."""
        if isinstance(self.policy, Evicting):
            raise NotImplementedError(
                f"{type(self.policy).__name__} lets go of tokens, which a guess that is taken back cannot undo: leave "
                "out prompt_lookup_num_tokens and assistant_model, or use a policy that keeps all, such as Quest"
            )

    def reset(self) -> None:
        """Forget every token."""
        self.state, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` becomes a copy of sequence ``beam_idx[i]``."""
        if beam_idx.tolist() != list(range(self._batch)):
            self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, in that order."""
        if self.state is not None:
            with torch.inference_mode(False):
                self.state = self.state.select(indices)

    def _refresh(self) -> None:
        """Nothing is handed on without queries."""
