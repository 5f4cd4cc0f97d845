"""A small encoder-decoder: mixers injected for the encoder, for the decoder's own tokens, and to read the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkit.masks import Mask
from attnkit.models.decoder import DecoderConfig, FeedForward, Mixers, empty_state, mixer_of, start_as_identity
from attnkit.models.encoder import Encoder, EncoderConfig
from attnkit.state import LayeredState


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes of both halves, which have one width."""

    encoder: EncoderConfig
    decoder: DecoderConfig

    def __post_init__(self) -> None:
        if self.encoder.width != self.decoder.width:
            raise ValueError(
                f"EncoderDecoderConfig: the encoder has width {self.encoder.width} and the decoder "
                f"{self.decoder.width}, expected one: the decoder's layers read the encoder's states"
            )


class CrossBlock(nn.Module):
    """Pre-norm: the mixer of the own tokens, the one that reads the source, the feed-forward."""

    def __init__(self, config: DecoderConfig, mixer: nn.Module, cross: nn.Module) -> None:
        super().__init__()
        self.mixer_norm, self.cross_norm, self.feed_norm = (nn.RMSNorm(config.width, eps=1e-6) for _ in range(3))
        self.mixer: Any = mixer
        self.cross: Any = cross
        self.feed = FeedForward(config.width, config.feed_forward)
        start_as_identity(self.feed, mixer, cross)

    def forward(self, x: Tensor, source: Tensor, mask: Mask | None) -> Tensor:
        return self._read(x + self.mixer(self.mixer_norm(x)), source, mask)

    def step(self, x: Tensor, source: Tensor, mask: Mask | None, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.step(self.mixer_norm(x), state)
        return self._read(x + mixed, source, mask), state

    def _read(self, x: Tensor, source: Tensor, mask: Mask | None) -> Tensor:
        normed = self.cross_norm(x)
        x = x + (self.cross(normed, source) if mask is None else self.cross(normed, source, mask=mask))
        y: Tensor = x + self.feed(self.feed_norm(x))
        return y


class EncoderDecoder(nn.Module):
    """An ``Encoder``, and a decoder whose layers also read its states; embeddings and starts are those of ``Decoder``.

    ``encoder_mixer`` and ``mixer`` make mixers of one sequence, ``cross`` modules called as ``cross(x, source)`` and,
    for padded sources, ``cross(x, source, mask=mask)``: the layers of softmax and of additive attention are both.
    Each may be a pattern, as in ``Decoder``.
    """

    def __init__(self, config: EncoderDecoderConfig, encoder_mixer: Mixers, mixer: Mixers, cross: Mixers) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, encoder_mixer)
        sizes = config.decoder
        self.embedding = nn.Embedding(sizes.vocab, sizes.width)
        nn.init.normal_(self.embedding.weight, std=sizes.width**-0.5)
        blocks = [
            CrossBlock(sizes, mixer_of(mixer, layer, sizes.layers), mixer_of(cross, layer, sizes.layers))
            for layer in range(sizes.layers)
        ]
        self.layers = cast("Sequence[CrossBlock]", nn.ModuleList(blocks))
        self.norm = nn.RMSNorm(sizes.width, eps=1e-6)

    def forward(self, source: Tensor, tokens: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Logits ``(b, m, vocab)`` of what follows each of ``tokens`` ``(b, m)``; ``source`` as for ``Encoder``.

        ``mask`` says which positions of the source there are: ``attnkit.padding(keep)``, or None for all.
        """
        states = self.encoder(source, mask=mask)
        x = self._embed(tokens)
        for block in self.layers:
            x = block(x, states, mask)
        return self._logits(x)

    def state(self, batch: int, capacity: int) -> LayeredState:
        """An empty decoding state for the decoder's own tokens."""
        return empty_state([block.mixer for block in self.layers], batch, capacity, like=self.embedding.weight)

    def step(
        self, tokens: Tensor, source: Tensor, state: LayeredState, *, mask: Mask | None = None
    ) -> tuple[Tensor, LayeredState]:
        """Feed the next tokens ``(b, m)``; ``source`` ``(b, n, width)`` is what ``encoder`` made, once.

        Each step projects the source's states again: simple, and no dearer than a step while the source is short.
        """
        state.admit(tokens.shape[1])
        x = self._embed(tokens)
        for i, (block, own) in enumerate(zip(self.layers, state.layers, strict=True)):
            x, state.layers[i] = block.step(x, source, mask, own)
        return self._logits(x), state

    @torch.no_grad()
    def generate(self, source: Tensor, tokens: Tensor, count: int, *, mask: Mask | None = None) -> Tensor:
        """Continue ``tokens`` ``(b, m)`` by the ``count`` likeliest tokens: ``(b, m + count)``."""
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"generate: tokens has shape {tuple(tokens.shape)}, expected (b, m) with at least 1 token")
        was_training = self.training
        self.eval()
        seen = self.encoder(source, mask=mask)
        state = self.state(tokens.shape[0], tokens.shape[1] + count)
        fresh = tokens
        for _ in range(count):
            logits, state = self.step(fresh, seen, state, mask=mask)
            fresh = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, fresh], 1)
        self.train(was_training)
        return tokens

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens) * self.config.decoder.width**0.5
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight)
