"""A model on trial: one set of weights, in float64 for the truth and in the dtype that is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnkit.parity.record import DoesNotApplyError

T = TypeVar("T")


@dataclass(eq=False)
class Subject:
    """A model and what it is asked to read.

    name: for people. model: in evaluation mode, in the dtype judged. gold: the same weights in float64.
    against: the implementation that is right by definition.
    ids: (b, n) tokens. text: (t,) tokens to measure perplexity on.
    """

    name: str
    model: Any
    gold: Any
    against: str
    ids: Tensor
    text: Tensor
    _known: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The precision judged."""
        found: torch.dtype = self.model.dtype
        return found

    @contextmanager
    def under(self, backend: str) -> Iterator[Any]:
        """The model with attention computed by ``backend``; raises ValueError where the model does not support it."""
        with implementation(self.model, backend):
            yield self.model

    def expected(self, key: str, run: Callable[[Any], T]) -> tuple[T, T]:
        """What ``run`` returns for the model in float64 and for the model judged, both under ``against``.

        It is run once for each ``key``. Raises ``DoesNotApplyError`` where the implementation compared with cannot.
        """
        if key not in self._known:
            try:
                with float64_softmax(), implementation(self.gold, self.against):
                    gold = run(self.gold)
                with self.under(self.against):
                    self._known[key] = gold, run(self.model)
            except Exception as error:
                self._known[key] = DoesNotApplyError(f"{self.against} itself cannot: {first_sentence(error)}")
        if isinstance(known := self._known[key], DoesNotApplyError):
            raise known
        gold, naive = known
        return gold, naive


def first_sentence(error: BaseException) -> str:
    """The first sentence of what an exception says, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__


@contextmanager
def implementation(model: Any, name: str) -> Iterator[None]:
    """``model`` under another attention implementation, and back."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:  # Transformers only logs a warning
            raise DoesNotApplyError("the model has its own attention, which no implementation replaces")
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def float64_softmax() -> Iterator[None]:
    """Eager attention rounds its weights to float32 whatever the model's dtype; this lets float64 through."""
    plain = nn.functional.softmax

    def softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        return plain(x, dim, _stacklevel, None if x.dtype == torch.float64 else dtype)

    nn.functional.softmax = softmax
    try:
        yield
    finally:
        nn.functional.softmax = plain


def layers(model: Any) -> dict[str, nn.Module]:
    """The model's layers by name, in order."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    wanted = getattr(model.config, "num_hidden_layers", None)
    for exact in (True, False):
        for name, found in lists.items():
            if len(found) == wanted if exact else len(found) > 1:
                return {f"{name}.{i}": layer for i, layer in enumerate(found)}
    return {}


@contextmanager
def hidden_states(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """What every layer returns, ``(b, m, ...)`` for each call, by the layer's name."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            seen.setdefault(name, []).append(first)

    hooks = [
        layer.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name, layer in layers(model).items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
