"""A small decoder with the mixer injected, so that models can differ in the mixer and in nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkit.mechanisms.softmax import SoftmaxAttention
from attnkit.state import LayeredState
from attnkit.state.policies import Policy

Mixer = Callable[[int], nn.Module]
"""Makes the mixer of layer ``i``: a module with ``forward(x)``, ``step(x, state)`` and ``state(batch, capacity)``."""

Mixers = Mixer | Sequence[Mixer]
"""One mixer for every layer, or a hybrid's pattern: repeated from the first layer on, and cut off at the last."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; ``hidden`` is the feed-forward width, 8/3 of ``width`` when None, as in Llama."""

    vocab: int
    width: int
    layers: int
    hidden: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "layers", "hidden"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"DecoderConfig: {name} is {size}, expected at least 1")

    @property
    def feed_forward(self) -> int:
        return round(self.width * 8 / 3) if self.hidden is None else self.hidden


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Block(nn.Module):
    """Pre-norm: the mixer, then the feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer: Any = mixer
        self.feed_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.feed = FeedForward(config.width, config.feed_forward)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        y: Tensor = x + self.feed(self.feed_norm(x))
        return y

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.step(self.mixer_norm(x), state)
        x = x + mixed
        return x + self.feed(self.feed_norm(x)), state


class Decoder(nn.Module):
    """RMSNorm, the injected mixer, SwiGLU, and one table for embedding and output; positions are the mixer's business.

    Weights start so that any width and depth behaves alike. Embeddings are N(0, 1/width) and are multiplied by
    ``sqrt(width)`` on the way in (as in Gemma): the residual stream starts with unit variance, and so do the logits.
    With the usual small embeddings, a mixer's first updates drown the tokens in the stream and recall is not learned
    (measured: see ``docs/notes/training.md``). ``gate_up`` is N(0, 1/width). What writes to the stream, ``down`` and a
    mixer's output projection, by convention its linear map ``o``, is 0, so that every layer starts as the identity; the
    rest of a mixer starts as it was made.

    ``mixer`` may be a pattern of several, such as five with a window and one without: a hybrid.
    """

    def __init__(self, config: DecoderConfig, mixer: Mixers) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        blocks = [Block(config, mixer_of(mixer, layer, config.layers)) for layer in range(config.layers)]
        self.layers = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        for block in self.layers:
            start_as_identity(block.feed, block.mixer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(b, n, vocab)`` of what follows each of ``tokens`` ``(b, n)`` int64."""
        x = self._embed(tokens)
        for block in self.layers:
            x = block(x)
        return self._logits(x)

    def state(self, batch: int, capacity: int, *, policy: Policy | None = None) -> LayeredState:
        """An empty state for ``batch`` sequences of up to ``capacity`` tokens: for each layer, what its mixer needs.

        With a ``policy`` a layer of softmax attention attends to what that chooses, see ``attnkit.state.policies``.
        """
        mixers = [block.mixer for block in self.layers]
        return empty_state(mixers, batch, capacity, like=self.embedding.weight, policy=policy)

    def step(self, tokens: Tensor, state: LayeredState) -> tuple[Tensor, LayeredState]:
        """Feed the next tokens ``(b, m)``; their logits ``(b, m, vocab)`` and the state after them."""
        state.admit(tokens.shape[1])
        x = self._embed(tokens)
        for i, (block, own) in enumerate(zip(self.layers, state.layers, strict=True)):
            x, state.layers[i] = block.step(x, own)
        return self._logits(x), state

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        cache: bool = True,
        policy: Policy | None = None,
    ) -> Tensor:
        """Continue ``tokens`` ``(b, n)`` by ``count`` tokens: ``(b, n + count)``.

        ``temperature`` 0 takes the likeliest token; otherwise tokens are drawn with ``seed``, among the ``top_k``
        likeliest when given. ``cache=False`` computes the whole sequence anew for every token, with the same result.
        ``policy`` is that of ``state``.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"generate: tokens has shape {tuple(tokens.shape)}, expected (b, n) with at least 1 token")
        if count < 0:
            raise ValueError(f"generate: count is {count}, expected at least 0")
        if temperature < 0:
            raise ValueError(f"generate: temperature is {temperature}, expected at least 0")
        if policy is not None and not cache:
            raise ValueError(f"generate: policy is {policy} and there is no cache, expected cache=True")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}, expected at least 1 or None")
        generator = torch.Generator().manual_seed(seed)
        was_training = self.training
        self.eval()
        state = self.state(tokens.shape[0], tokens.shape[1] + count, policy=policy) if cache else None
        fresh = tokens
        for _ in range(count):
            if state is None:
                logits = self(tokens)
            else:
                logits, state = self.step(fresh, state)
            fresh = _choose(logits[:, -1].float().cpu(), temperature, top_k, generator)[:, None].to(tokens.device)
            tokens = torch.cat([tokens, fresh], 1)
        self.train(was_training)
        return tokens

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens) * self.config.width**0.5
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight)


def mixer_of(mixer: Mixers, layer: int, layers: int) -> nn.Module:
    """The mixer of layer ``layer`` of ``layers``: a pattern repeats.

    Raises ``ValueError`` for a pattern that has more mixers than the model has layers, as some would never be used.
    """
    if callable(mixer):
        return mixer(layer)
    if not 1 <= len(mixer) <= layers:
        raise ValueError(
            f"a pattern has {len(mixer)} mixers for {layers} layers, expected 1 to {layers}: shorten it or add layers"
        )
    return mixer[layer % len(mixer)](layer)


def empty_state(
    mixers: Sequence[Any], batch: int, capacity: int, *, like: Tensor, policy: Policy | None = None
) -> LayeredState:
    """The empty states of ``mixers``, in the dtype and on the device of ``like``, ``policy`` where it applies."""
    states = []
    for layer, mixer in enumerate(mixers):
        own = policy.for_layer(layer, len(mixers)) if policy is not None else None
        if policy is not None and not isinstance(mixer, SoftmaxAttention):
            raise NotImplementedError(f"layer {layer} is a {type(mixer).__name__}: policies are for SoftmaxAttention")
        extra = {} if own is None else {"policy": own}
        states.append(mixer.state(batch, capacity, dtype=like.dtype, device=like.device, **extra))
    return LayeredState(states)


def start_as_identity(feed: FeedForward, *mixers: nn.Module) -> None:
    """Set what a layer writes to the residual stream to 0: ``down``, and the map ``o`` of mixers that have one."""
    nn.init.normal_(feed.gate_up.weight, std=feed.gate_up.in_features**-0.5)
    nn.init.zeros_(feed.down.weight)
    for mixer in mixers:
        if isinstance(output := getattr(mixer, "o", None), nn.Linear):
            nn.init.zeros_(output.weight)


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """The next token ``(b,)`` for ``logits`` ``(b, vocab)``."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def parameters(model: nn.Module) -> int:
    """Numbers that training adjusts."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def match_parameters(config: DecoderConfig, mixer: Mixers, target: int) -> DecoderConfig:
    """``config`` with the feed-forward width that brings a decoder with ``mixer`` closest to ``target`` parameters.

    Raises ``ValueError`` when the nearest one is more than 0.5 % off.
    """
    without = parameters(Decoder(replace(config, hidden=1), mixer))
    unit = 3 * config.width * config.layers
    hidden = max(1, 1 + round((target - without) / unit))
    total = without + (hidden - 1) * unit
    if abs(total - target) > 0.005 * target:
        raise ValueError(
            f"match_parameters: the nearest decoder has {total} parameters (feed-forward width {hidden}), "
            f"expected within 0.5 % of {target}: make the mixer smaller or the decoder wider"
        )
    return replace(config, hidden=hidden)
