"""A small bidirectional encoder with the mixer injected, of tokens or of vectors such as image patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from attnkit.masks import Mask
from attnkit.models.decoder import FeedForward, Mixers, mixer_of, start_as_identity


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder. ``inputs`` is the vocabulary or, with ``vectors``, the size of each input vector.

    ``hidden`` is the feed-forward width, 8/3 of ``width`` when None.
    """

    inputs: int
    width: int
    layers: int
    vectors: bool = False
    hidden: int | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "width", "layers", "hidden"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"EncoderConfig: {name} is {size}, expected at least 1")

    @property
    def feed_forward(self) -> int:
        return round(self.width * 8 / 3) if self.hidden is None else self.hidden


class EncoderBlock(nn.Module):
    """Pre-norm, as the decoder's block; ``mask`` reaches the mixer when there is one."""

    def __init__(self, config: EncoderConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer: Any = mixer
        self.feed_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.feed = FeedForward(config.width, config.feed_forward)
        start_as_identity(self.feed, mixer)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        normed = self.mixer_norm(x)
        # Mixers without masks can encode as well, as long as nothing is padded.
        x = x + (self.mixer(normed) if mask is None else self.mixer(normed, mask=mask))
        y: Tensor = x + self.feed(self.feed_norm(x))
        return y


class Encoder(nn.Module):
    """RMSNorm, the injected mixer and SwiGLU, layer by layer; positions are the mixer's business.

    The mixer decides who sees whom: with ``mask=None`` in its configuration every position sees every other. Every
    layer starts as the identity and tokens, and vectors of unit
    variance, enter with unit variance, as in ``Decoder``.
    """

    def __init__(self, config: EncoderConfig, mixer: Mixers) -> None:
        super().__init__()
        self.config = config
        self.enter: nn.Module
        if config.vectors:
            linear = nn.Linear(config.inputs, config.width)
            nn.init.normal_(linear.weight, std=config.inputs**-0.5)
            nn.init.zeros_(linear.bias)
            self.enter = linear
        else:
            self.enter = nn.Embedding(config.inputs, config.width)
        blocks = [EncoderBlock(config, mixer_of(mixer, layer, config.layers)) for layer in range(config.layers)]
        self.layers = cast("Sequence[EncoderBlock]", nn.ModuleList(blocks))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def forward(self, source: Tensor, *, mask: Mask | None = None) -> Tensor:
        """States ``(b, n, width)`` of tokens ``(b, n)`` int64, or of vectors ``(b, n, inputs)``.

        ``mask`` joins each mixer's own: ``attnkit.padding(keep)`` for sources of different lengths.
        """
        x = self.enter(source)
        for block in self.layers:
            x = block(x, mask)
        y: Tensor = self.norm(x)
        return y
