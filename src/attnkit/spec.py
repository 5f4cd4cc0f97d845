"""The records every tool reads: what a mechanism is, what can run it, what it costs. No logic lives here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Call = Mapping[str, Any]
"""The checked arguments of a mechanism's function, by name (what ``Mechanism.call`` returns)."""


def _none(call: Call) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Sizes:
    """Sizes of one attention call, in the axes of the field: see the table of words in the documentation.

    ``b`` batch, ``h`` query heads, ``g`` key/value heads, ``m`` queries, ``n`` keys, ``d`` key size, ``e`` value size.
    """

    b: int = 1
    h: int = 1
    g: int = 1
    m: int = 1
    n: int = 1
    d: int = 64
    e: int = 64


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer stands in a model: its width and heads, its place in the stack, what the whole model is like.

    ``window`` is what local layers see. ``qk_norm`` asks layers that can to normalise queries and keys.
    """

    width: int
    heads: int
    window: int = 128
    layer: int = 0
    layers: int = 1
    qk_norm: bool = False


@dataclass(frozen=True)
class Cost:
    """What one call takes: multiply-adds counted as two, bytes moved at least once, and bytes of state."""

    flops: int
    bytes: int
    state_bytes_per_token: int
    state_bytes_fixed: int

    def state_bytes(self, tokens: int) -> int:
        """Bytes of decoding state of one sequence that can hold ``tokens`` tokens."""
        return self.state_bytes_fixed + self.state_bytes_per_token * tokens


@dataclass(frozen=True)
class Laws:
    """What the equation promises; the contract tests check each promise that is made."""

    causal: bool
    """An output never depends on a later input (for the default mask)."""
    stateful: bool
    """Tokens can be fed in pieces through a state."""
    step_equals_prefill: bool
    """Feeding tokens one by one gives the rows of the one-shot result."""
    length_invariant: bool
    """Appending keys that no query may see changes nothing."""
    separate_heads: bool = True
    """No head reads what another computes: permuting heads permutes the result."""
    separate_readers: bool = True
    """Query heads share a KV head and nothing else: writing it out for each of its readers changes nothing."""
    soft: bool = True
    """Weights are a differentiable function of the scores and equal scores share. Else one key is chosen: the first of
    equals, a positive scale shows in gradients only, and the gradient of scores is an estimate and no derivative."""
    every_key: bool = True
    """Every key that a query may see counts for it; none is left out by choice."""
    weights_sum_to_one: bool = True
    """Values that are all 1 give 1 wherever something is visible."""


@dataclass(frozen=True)
class Backend:
    """One way to run a mechanism.

    ``rejects`` gives the reasons, with values, why a call cannot run here; an empty tuple means that it can, fully.
    ``declines`` gives the reasons why a call that *could* run is not taken unless the backend is named.
    ``finite_only`` says that NaN or infinity in a key or value that a row may not see can reach that row.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    rejects: Callable[[Call], tuple[str, ...]] = _none
    declines: Callable[[Call], tuple[str, ...]] = _none
    grad: bool = True
    finite_only: bool = False


@dataclass(frozen=True)
class Preset:
    """A named configuration of a mechanism's layer, such as MQA, which is softmax attention with one KV head.

    ``configure(place)`` gives the configuration of the layer at a ``LayerPlace``; its ``window`` scales what is local.
    """

    name: str
    title: str
    paper: str
    configure: Callable[[LayerPlace], Any]


@dataclass(frozen=True)
class Mechanism:
    """One attention equation and everything tools need to know of it.

    ``call`` checks the arguments of ``function`` and returns them by name; ``function`` is what users call.
    ``sample(seed, sizes, dtype, device)`` makes arguments for ``function``. ``reference`` is the readable definition.
    """

    name: str
    title: str
    equation: str
    papers: tuple[str, ...]
    call: Callable[..., dict[str, Any]]
    function: Callable[..., Any]
    sample: Callable[..., dict[str, Any]]
    reference: Callable[..., Any]
    backends: tuple[Backend, ...]
    laws: Laws
    cost: Callable[..., Cost]
    layer: Callable[..., Any]
    state: type | None = None
    presets: tuple[Preset, ...] = ()

    def backend(self, name: str) -> Backend:
        """The backend called ``name``."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        names = ", ".join(b.name for b in self.backends)
        raise ValueError(f"{self.name} has no backend {name!r}: name one of {names}")

    def preset(self, name: str) -> Preset:
        """The preset called ``name``."""
        for preset in self.presets:
            if preset.name == name:
                return preset
        names = ", ".join(p.name for p in self.presets)
        raise ValueError(f"{self.name} has no preset {name!r}: name one of {names}")


@dataclass(frozen=True)
class Decision:
    """Which backend runs a call, and why each one before it does not."""

    mechanism: str
    chosen: str | None
    rejected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.mechanism}: {self.chosen} runs" if self.chosen else f"{self.mechanism}: no backend can run this"
        return "\n".join([head, *(f"  {name}: {'; '.join(why)}" for name, why in self.rejected.items())])
