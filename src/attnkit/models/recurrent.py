"""The recurrent encoder-decoders that attention came from: Bahdanau's, and Luong's with input feeding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attnkit.masks import padding
from attnkit.mechanisms.additive import additive_attention
from attnkit.mechanisms.luong import LuongAttention, LuongConfig


@dataclass(frozen=True)
class RecurrentConfig:
    """Sizes: two vocabularies, the embeddings' ``width``, and the ``hidden`` size of the GRUs (of each direction)."""

    source_vocab: int
    target_vocab: int
    width: int
    hidden: int

    def __post_init__(self) -> None:
        for name in ("source_vocab", "target_vocab", "width", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"RecurrentConfig: {name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Source:
    """An encoded source: ``states`` ``(b, n, 2 hidden)``, the backward GRU's ``last`` ``(b, hidden)``, ``lengths``.

    ``keys`` are the states as a decoder projected them, once for all its steps.
    """

    states: Tensor
    last: Tensor
    lengths: Tensor | None
    keys: Tensor


class RecurrentDecoder(Protocol):
    """What ``RecurrentModel`` asks of a decoder, one step at a time."""

    def project(self, states: Tensor) -> Tensor:
        """The keys of the source's states."""

    def begin(self, source: Source) -> Any:
        """The state before the first step."""

    def step(self, tokens: Tensor, state: Any, source: Source, at: int) -> tuple[Tensor, Any, Tensor]:
        """Logits ``(b, vocab)`` after ``tokens`` ``(b,)``, the state, and what attended ``(b, hidden)``."""

    def weights(self, queries: Tensor, source: Source) -> Tensor:
        """How much each of the queries ``(b, m, hidden)`` took from each position of the source: ``(b, m, n)``."""


class AdditiveDecoder(nn.Module):
    """Bahdanau's decoder: the state *before* the step attends, and the context goes into the GRU and to the output.

    The output layer is the paper's: maxout over pairs of a map of state, last token and context.
    """

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        c, both = config, 2 * config.hidden
        self.embedding = nn.Embedding(c.target_vocab, c.width)
        self.first = nn.Linear(c.hidden, c.hidden)
        self.query = nn.Linear(c.hidden, c.hidden)
        self.key = nn.Linear(both, c.hidden, bias=False)
        self.score = nn.Parameter(torch.randn(1, c.hidden) * c.hidden**-0.5)
        self.cell = nn.GRUCell(c.width + both, c.hidden)
        self.deep = nn.Linear(c.hidden + c.width + both, 2 * c.width)
        self.out = nn.Linear(c.width, c.target_vocab)

    def project(self, states: Tensor) -> Tensor:
        keys: Tensor = self.key(states)
        return keys

    def begin(self, source: Source) -> Tensor:
        return torch.tanh(self.first(source.last))

    def step(self, tokens: Tensor, state: Tensor, source: Source, at: int) -> tuple[Tensor, Tensor, Tensor]:
        context = self._attend(state[:, None], source, source.states)[:, 0]
        token = self.embedding(tokens)
        after = self.cell(torch.cat([token, context], -1), state)
        deep = self.deep(torch.cat([state, token, context], -1)).unflatten(-1, (-1, 2)).amax(-1)
        return self.out(deep), after, state

    def weights(self, queries: Tensor, source: Source) -> Tensor:
        eye = torch.eye(source.states.shape[1], dtype=queries.dtype, device=queries.device)
        return self._attend(queries, source, eye.expand(len(queries), -1, -1))

    def _attend(self, queries: Tensor, source: Source, values: Tensor) -> Tensor:
        n, lengths = values.shape[1], source.lengths
        mask = None if lengths is None else padding(torch.arange(n, device=values.device) < lengths[:, None])
        asks = self.query(queries)[:, None]
        o: Tensor = additive_attention(asks, source.keys[:, None], values[:, None], self.score, mask=mask)
        return o[:, 0]


class LuongDecoder(nn.Module):
    """Luong's decoder: the state *after* the step attends, and input feeding hands the attentional state to the next.

    The paper stacks LSTMs over a one-directional encoder; this one has a GRU and the encoder of ``RecurrentModel``.
    """

    def __init__(self, config: RecurrentConfig, attention: LuongConfig) -> None:
        super().__init__()
        if (attention.width, attention.source) != (config.hidden, 2 * config.hidden):
            raise ValueError(
                f"LuongDecoder: attention has width {attention.width} and context {attention.source}, expected "
                f"{config.hidden} and {2 * config.hidden}, the sizes of the decoder's and the encoder's states"
            )
        self.embedding = nn.Embedding(config.target_vocab, config.width)
        self.first = nn.Linear(config.hidden, config.hidden)
        self.cell = nn.GRUCell(config.width + config.hidden, config.hidden)
        self.attention = LuongAttention(attention)
        self.out = nn.Linear(config.hidden, config.target_vocab)

    def project(self, states: Tensor) -> Tensor:
        return states

    def begin(self, source: Source) -> tuple[Tensor, Tensor]:
        """The GRU's state, and the attentional state that is fed to the next input: none yet."""
        state = torch.tanh(self.first(source.last))
        return state, torch.zeros_like(state)

    def step(
        self, tokens: Tensor, state: tuple[Tensor, Tensor], source: Source, at: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        hidden, fed = state
        hidden = self.cell(torch.cat([self.embedding(tokens), fed], -1), hidden)
        fed = self.attention(hidden[:, None], source.keys, lengths=source.lengths, start=at)[:, 0]
        return self.out(fed), (hidden, fed), hidden

    def weights(self, queries: Tensor, source: Source) -> Tensor:
        return self.attention.weights(queries, source.keys, lengths=source.lengths)


class RecurrentModel(nn.Module):
    """A bidirectional GRU that encodes, and a decoder that attends to its states at every step."""

    def __init__(self, config: RecurrentConfig, decoder: AdditiveDecoder | LuongDecoder) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.source_vocab, config.width)
        self.encoder = nn.GRU(config.width, config.hidden, batch_first=True, bidirectional=True)
        self.decoder = decoder

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Source:
        """Encode tokens ``(b, n)`` int64; ``lengths`` ``(b,)`` are their true numbers, at least 1 each."""
        x: Any = self.embedding(source)
        if lengths is None:
            states, last = self.encoder(x)
        else:
            # Packed, so that the backward direction starts at the last token and not in the padding.
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            out, last = self.encoder(packed)
            states, _ = pad_packed_sequence(out, batch_first=True, total_length=source.shape[1])
        # The backward direction ends at the first token, having seen all.
        return Source(states, last[1], lengths, self.decoder.project(states))

    def forward(self, source: Tensor, tokens: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Logits ``(b, m, vocab)`` of what follows each of ``tokens`` ``(b, m)`` (teacher forcing)."""
        return self._run(self.encode(source, lengths), tokens)[0]

    def alignment(self, source: Tensor, tokens: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Weights ``(b, m, n)`` with which the step after each of ``tokens`` read the source."""
        encoded = self.encode(source, lengths)
        return self.decoder.weights(self._run(encoded, tokens)[1], encoded)

    @torch.no_grad()
    def generate(self, source: Tensor, tokens: Tensor, count: int, *, lengths: Tensor | None = None) -> Tensor:
        """Continue ``tokens`` ``(b, m)`` by the ``count`` likeliest tokens: ``(b, m + count)``."""
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"generate: tokens has shape {tuple(tokens.shape)}, expected (b, m) with at least 1 token")
        encoded = self.encode(source, lengths)
        decoder: RecurrentDecoder = self.decoder
        state = decoder.begin(encoded)
        for at in range(tokens.shape[1] + count - 1):
            logits, state, _ = decoder.step(tokens[:, at], state, encoded, at)
            if at == tokens.shape[1] - 1:
                tokens = torch.cat([tokens, logits.argmax(-1)[:, None]], 1)
        return tokens

    def _run(self, source: Source, tokens: Tensor) -> tuple[Tensor, Tensor]:
        decoder: RecurrentDecoder = self.decoder
        state = decoder.begin(source)
        rows, queries = [], []
        for at in range(tokens.shape[1]):
            logits, state, query = decoder.step(tokens[:, at], state, source, at)
            rows.append(logits)
            queries.append(query)
        return torch.stack(rows, 1), torch.stack(queries, 1)
