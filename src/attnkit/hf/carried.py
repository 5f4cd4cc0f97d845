"""Tensors that carry an object through a model in place of their numbers, to the attention function that knows it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from attnkit.state import KVState, PagedKVState


class Carried(Tensor):
    """A tensor without numbers. What leaves it whole gives another one; all else is computed with ``dense()``."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own idiom

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def again(self, device: Any) -> Self:
        """The same in a tensor of its own."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The numbers, in a plain tensor."""
        raise NotImplementedError

    def refuse(self, name: str, kwargs: dict[str, Any]) -> None:
        """Raise unless the operation ``name`` may have the numbers."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the function that disables it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = func.overloadpacket.__name__, kwargs or {}
        if isinstance(args[0], Carried) and _leaves_whole(name, args, options):
            return args[0].again(options.get("device") or args[0].device)

        def plain(one: Carried) -> Tensor:
            one.refuse(name, options)
            return one.dense()

        args, options = torch.utils._pytree.tree_map_only(Carried, plain, (args, options))
        return func(*args, **options)


def _leaves_whole(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    match name:
        case "detach" | "alias" | "clone":
            return True
        case "_to_copy":
            return kwargs.get("dtype") in (None, args[0].dtype)
        case "slice":
            defaults: tuple[Any, ...] = (0, None, None, 1)
            axis, start, end, step = args[1:] + defaults[len(args) - 1 :]
            return not start and (end is None or end >= args[0].shape[axis]) and bool(step == 1)
    return False


class Held:
    """The tokens that a state holds now, for as long as it holds no other."""

    def __init__(self, state: KVState | PagedKVState) -> None:
        self.state, self.length = state, state.length
        self._dense: tuple[Tensor, Tensor] | None = None

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values in plain tensors, made once for both."""
        if self.state.length != self.length:
            raise RuntimeError(
                f"the cache handed on {self.length} tokens and holds {self.state.length} now: attend to what update "
                "returns before the next update"
            )
        if self._dense is None:
            view = self.state.view()
            self._dense = view.k, view.v
        return self._dense


class CarriedRows(Carried):
    """The keys or the values of a state ``(b, g, n, size)``, which kernels read in place.

    Attributes
    ----------
    held: what they are of; the keys and the values of one update have the same one.
    which: 0 for keys and 1 for values.
    """

    held: Held
    which: int

    @staticmethod
    def __new__(cls, held: Held, which: int, new: Tensor) -> CarriedRows:
        """``new`` is like the tokens that were just stored, ``(b, g, m, size)``."""
        b, g, _, size = new.shape
        made: CarriedRows = torch.Tensor._make_wrapper_subclass(
            cls, (b, g, held.length, size), dtype=new.dtype, device=new.device
        )
        made.held, made.which = held, which
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # theirs has no types
        return f"CarriedRows({self.held.state!r}, {'kv'[self.which]}, shape={tuple(self.shape)})"

    def again(self, device: Any) -> CarriedRows:
        return CarriedRows(self.held, self.which, self)

    def dense(self) -> Tensor:
        return self.held.dense()[self.which]


def carried(state: KVState | PagedKVState, k: Tensor, v: Tensor) -> tuple[CarriedRows, CarriedRows]:
    """Keys and values of all that ``state`` holds, whose newest tokens are ``k`` and ``v``."""
    held = Held(state)
    return CarriedRows(held, 0, k), CarriedRows(held, 1, v)


def state_of(key: Tensor, value: Tensor) -> KVState | PagedKVState | None:
    """The state whose keys and values these are, if a model hands on just what it holds."""
    if not (isinstance(key, CarriedRows) and isinstance(value, CarriedRows)):
        return None
    held = key.held
    same = held is value.held and (key.which, value.which) == (0, 1)
    return held.state if same and held.state.length == held.length else None


def plain(x: Tensor) -> Tensor:
    """``x`` with its numbers."""
    return x.dense() if isinstance(x, Carried) else x
