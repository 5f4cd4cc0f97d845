"""A model on trial: one set of weights, in float64 for the truth and in the dtype that is judged."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from attnkit.parity.record import DoesNotApplyError

T = TypeVar("T")


@dataclass(eq=False)
class Subject:
    """A model and what it is asked to read.

    name: for people. model: in evaluation mode, in the dtype judged. gold: the same weights in float64.
    against: the implementation that is right by definition.
    ids: (b, n) tokens. text: (t,) tokens to measure perplexity on. prompt: how many of them text is written after.
    new: how many tokens of it.
    """

    name: str
    model: Any
    gold: Any
    against: str
    ids: Tensor
    text: Tensor
    prompt: int
    new: int
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

    def true(self, key: str, run: Callable[[Any], T]) -> T:
        """What ``run`` returns for the model in float64 under ``against``; it is run once for each ``key``.

        Raises ``DoesNotApplyError`` where the implementation compared with cannot.
        """
        return self._once(f"true {key}", lambda: self._gold(run))

    def plain(self, key: str, run: Callable[[Any], T]) -> T:
        """The same for the model in the dtype judged."""
        return self._once(f"plain {key}", lambda: self._run(self.against, run))

    def tried(self, backend: str, key: str, run: Callable[[Any], T]) -> T:
        """What ``run`` returns for the model judged under ``backend``; ``key`` has to name the run, its cache included.

        Raises ``DoesNotApplyError`` for what the implementation compared with cannot do either, unless it is refused.
        """
        try:
            return self._run(backend, run)
        except (NotImplementedError, ValueError, DoesNotApplyError):
            raise
        except Exception:
            self.plain(key, run)
            raise

    def _gold(self, run: Callable[[Any], T]) -> T:
        with float64_softmax(), implementation(self.gold, self.against):
            return run(self.gold)

    def _run(self, backend: str, run: Callable[[Any], T]) -> T:
        with self.under(backend) as model:
            return run(model)

    def _once(self, key: str, run: Callable[[], T]) -> T:
        if key not in self._known:
            try:
                self._known[key] = run()
            except Exception as error:
                self._known[key] = DoesNotApplyError(f"{self.against} itself cannot: {first_sentence(error)}")
        if isinstance(known := self._known[key], DoesNotApplyError):
            raise known
        result: T = known
        return result


def usable(backends: Sequence[str]) -> None:
    """Raise ValueError for a name that is no attention implementation of Transformers or its plug-ins."""
    known = ("eager", *AttentionInterface().keys())
    for name in backends:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f", perhaps {near[0]!r}" if near else ""
            raise ValueError(
                f"there is no attention implementation {name!r}{hint}: register it first, or name eager or sdpa"
            )


def first_sentence(error: BaseException) -> str:
    """The first sentence of what an exception says, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


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

    def softmax(
        input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> Tensor:
        return plain(input, dim, _stacklevel, None if input.dtype == torch.float64 else dtype)

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
