"""A model by its sizes: layers, what mixes tokens in each, and how many weights there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from attnkit import costs
from attnkit.costs import Band
from attnkit.spec import Cost, Sizes

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "fp8": 1}


@dataclass(frozen=True)
class Mixer:
    """What mixes tokens in a layer: a mechanism by the name of its record, its sizes, and the arguments of its cost.

    ``window`` is what it sees, its own token included, beside the first ``sinks``. ``codec`` is how the cache keeps
    numbers. ``keeps`` False reads what an earlier layer keeps. ``budget`` is the number of tokens that a policy keeps,
    ``reads`` how many of those kept a decoding step reads. ``source`` attends to the tokens of another sequence.
    ``weights`` counts those of its maps. ``layer`` is a layer of attnkit whose ``cost`` is asked instead.
    """

    mechanism: str
    heads: int = 1
    groups: int = 1
    key_size: int = 1
    value_size: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    window: int | None = None
    sinks: int = 0
    codec: str | None = None
    keeps: bool = True
    budget: int | None = None
    reads: int | None = None
    source: bool = False
    one_way: bool = True
    weights: int = 0
    layer: Any = None

    def cost(self, m: int, n: int, itemsize: int) -> Cost:
        """What ``m`` new tokens of a sequence of ``n`` take, and the state that holds them."""
        return _cost(self, m, n, itemsize)

    @property
    def grows(self) -> bool:
        """Whether its state grows with the sequence, without end."""
        return (
            self.keeps
            and self.budget is None
            and self.cost(1, 1 << 20, 2).state_bytes(1 << 20) > 2 * self.cost(1, 1 << 18, 2).state_bytes(1 << 18)
        )


def record(mechanism: str) -> Callable[..., Cost]:
    """The cost function of a mechanism; one that ``attnkit.costs`` has is found without importing torch."""
    found: Callable[..., Cost] | None = getattr(costs, mechanism, None)
    if found is None:
        from attnkit.registry import get

        found = get(mechanism).cost
    return found


@lru_cache(maxsize=1 << 14)
def _cost(mixer: Mixer, m: int, n: int, itemsize: int) -> Cost:
    if mixer.layer is not None:
        import torch

        found: Cost = mixer.layer.cost(m, n, dtype={2: torch.bfloat16, 4: torch.float32}[itemsize])
        return found
    options = dict(mixer.options)
    if mixer.mechanism in ("softmax", "differential"):
        band = Band(mixer.window, mixer.sinks, mixer.one_way and not mixer.source)
        options |= {"mask": band} | ({"codec": mixer.codec} if mixer.codec else {})
    held = n if mixer.budget is None else min(n, mixer.budget)
    if mixer.reads is not None and m == 1:
        held = min(held, mixer.reads)
    if m > 1:
        held = n  # a policy lets go of tokens after the prompt has been read
    sizes = Sizes(1, mixer.heads, mixer.groups, m, held, mixer.key_size, mixer.value_size)
    found = record(mixer.mechanism)(sizes, **options, itemsize=itemsize)
    if not mixer.keeps:
        return replace(found, state_bytes_per_token=0, state_bytes_fixed=0)
    if mixer.budget is not None or mixer.reads is not None:
        kept = n if mixer.budget is None else min(n, mixer.budget)
        whole = record(mixer.mechanism)(replace(sizes, n=kept), **options, itemsize=itemsize)
        return replace(found, state_bytes_per_token=0, state_bytes_fixed=whole.state_bytes(kept))
    return found


@dataclass(frozen=True)
class Layer:
    """One layer: its mixers, and its other weights: ``dense``, and ``experts`` of which a token takes ``chosen``."""

    mixers: tuple[Mixer, ...]
    dense: int = 0
    expert: int = 0
    experts: int = 0
    chosen: int = 0

    @property
    def weights(self) -> int:
        """All of its weights."""
        return sum(mixer.weights for mixer in self.mixers) + self.dense + self.expert * self.experts

    @property
    def active(self) -> int:
        """Weights that one token is multiplied with."""
        return sum(mixer.weights for mixer in self.mixers) + self.dense + self.expert * self.chosen

    def touched(self, tokens: int) -> float:
        """Weights that ``tokens`` tokens read, each with experts of its own, chosen evenly."""
        if not self.experts:
            return self.weights
        missed = (1 - self.chosen / self.experts) ** tokens
        return self.active - self.expert * self.chosen + self.expert * self.experts * (1 - missed)


@dataclass(frozen=True)
class Model:
    """A whole model; ``embedding`` are weights that are looked up, ``head`` those that make logits.

    ``itemsize`` is of the numbers that are computed and cached, ``weight_bits`` of weights as they are stored.
    ``unknown`` are keys of its configuration that nothing here reads, ``ignored`` those known to change no size.
    """

    name: str
    family: str
    width: int
    vocabulary: int
    layers: tuple[Layer, ...]
    embedding: int = 0
    head: int = 0
    tied: bool = False
    itemsize: int = 2
    dtype: str = "bfloat16"
    weight_bits: float = 16
    longest: int | None = None
    hidden: int = 0
    encoder: tuple[Layer, ...] = ()
    unknown: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.embedding + self.head + sum(layer.weights for layer in (*self.layers, *self.encoder))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return int(self.weights * self.weight_bits // 8)

    @property
    def active(self) -> int:
        """Weights that one token of the decoder is multiplied with; those of the head included."""
        return sum(layer.active for layer in self.layers) + (self.embedding if self.tied else self.head)

    @cached_property
    def mixers(self) -> Mapping[Mixer, int]:
        """The different mixers and how many layers have each."""
        return Counter(mixer for layer in self.layers for mixer in layer.mixers)

    def state_bytes(self, tokens: int, source: int = 0) -> int:
        """Bytes that decoding keeps of one sequence of ``tokens``, which attends to ``source`` others."""
        return sum(count * cost.state_bytes(n) for count, cost, n in self._costs(1, tokens, source))

    def token_bytes(self, source: int = 0) -> int:
        """Bytes that one more token adds, where every window is full: what the cache grows by."""
        far = 1 << 20
        return (self.state_bytes(2 * far, source) - self.state_bytes(far, source)) // far

    def attention(self, m: int, n: int, source: int = 0) -> tuple[int, int]:
        """Operations and bytes of all mixers, for ``m`` new tokens of a sequence of ``n``."""
        found = [(count * cost.flops, count * cost.bytes) for count, cost, _ in self._costs(m, n, source)]
        return sum(flops for flops, _ in found), sum(moved for _, moved in found)

    def _costs(self, m: int, n: int, source: int) -> Iterator[tuple[int, Cost, int]]:
        for mixer, count in self.mixers.items():
            length = max(1, source) if mixer.source else max(1, n)
            yield count, mixer.cost(m, length, self.itemsize), length

    def cast(self, dtype: str) -> Model:
        """The same model computed and cached in ``dtype``, and stored in it unless it is quantised."""
        itemsize = ITEMSIZE.get(dtype, 0)
        if itemsize < 2:
            raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
        bits = itemsize * 8 if self.weight_bits == self.itemsize * 8 else self.weight_bits
        return replace(self, dtype=dtype, itemsize=itemsize, weight_bits=bits)

    def map(self, change: Callable[[Mixer, int], Mixer]) -> Model:
        """The same model with each mixer changed; ``change`` gets it and the index of its layer."""
        layers = tuple(
            replace(layer, mixers=tuple(change(mixer, i) for mixer in layer.mixers))
            for i, layer in enumerate(self.layers)
        )
        return replace(self, layers=layers)

    @property
    def shape(self) -> str:
        """Its layers in words: ``36 layers of 32/8 heads of 128``."""
        return ", ".join(f"{count} x {describe(mixer)}" for mixer, count in self.mixers.items())


def describe(mixer: Mixer) -> str:
    """A mixer in a few words."""
    options = dict(mixer.options)
    if mixer.layer is not None:
        return f"{mixer.mechanism} of {mixer.heads} heads"
    match mixer.mechanism:
        case "softmax":
            words = f"{mixer.heads}/{mixer.groups} heads of {mixer.key_size}"
            words = f"cross {words}" if mixer.source else words
        case "mla" | "dsa":
            words = f"{mixer.mechanism.upper()} {mixer.heads} heads, latent {options['latent']}+{options['rotary']}"
            words += f", top {options['top']}" if "top" in options else ""
        case "compressed":
            rate = options.get("rate")
            words = f"{mixer.heads} heads of {mixer.key_size}, window {options['window']}" + (
                f", 1 entry per {rate} tokens" if rate else ""
            )
        case "convolution":
            words = "short convolution"
        case name:
            words = f"{name} {mixer.heads} heads of {mixer.key_size}x{mixer.value_size}"
    words += f", window {mixer.window}" if mixer.window else ""
    words += f" + {mixer.sinks} first tokens" if mixer.sinks else ""
    words += f", {mixer.codec} cache" if mixer.codec else ""
    words += f", {mixer.budget} tokens kept" if mixer.budget else ""
    words += f", {mixer.reads} tokens read" if mixer.reads else ""
    return words + ("" if mixer.keeps else ", shared cache")
