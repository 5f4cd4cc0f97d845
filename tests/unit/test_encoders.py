"""Encoder, encoder-decoder and the recurrent models: padding, decode equals teacher forcing, they learn, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attnkit
from attnkit.mechanisms.additive import AdditiveAttention, AdditiveConfig
from attnkit.mechanisms.luong import LuongConfig
from attnkit.mechanisms.softmax import SoftmaxAttention, SoftmaxConfig
from attnkit.models.decoder import DecoderConfig
from attnkit.models.encoder import Encoder, EncoderConfig
from attnkit.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from attnkit.models.recurrent import AdditiveDecoder, LuongDecoder, RecurrentConfig, RecurrentModel
from attnkit.positions import Rotary

WIDTH, HEADS = 16, 2
MIXERS: dict[str, Callable[[bool], nn.Module]] = {
    "softmax": lambda causal: SoftmaxAttention(
        SoftmaxConfig(WIDTH, HEADS, mask=attnkit.causal() if causal else None, rotary=Rotary(WIDTH // HEADS))
    ),
    "additive": lambda causal: AdditiveAttention(
        AdditiveConfig(WIDTH, HEADS, mask=attnkit.causal() if causal else None)
    ),
}
RECURRENT = ("additive", "dot", "general", "concat", "location", "local-m", "local-p")
LENGTHS = torch.tensor([7, 4])
KEEP = attnkit.padding(torch.arange(7) < LENGTHS[:, None])


def awake(model: nn.Module) -> nn.Module:
    """The model in float64 with layers that do something: fresh ones start as the identity."""
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.double()


def encoder_decoder(name: str) -> EncoderDecoder:
    torch.manual_seed(0)
    config = EncoderDecoderConfig(EncoderConfig(11, WIDTH, 2), DecoderConfig(13, WIDTH, 2))
    make = MIXERS[name]
    return EncoderDecoder(config, lambda i: make(False), lambda i: make(True), lambda i: make(False))


def recurrent(name: str) -> RecurrentModel:
    torch.manual_seed(0)
    config = RecurrentConfig(11, 13, 8, 12)
    if name == "additive":
        return RecurrentModel(config, AdditiveDecoder(config))
    local = name[-1] if name.startswith("local") else None
    # States have 12 channels and the source's 24, so dot scores need a general matrix in the paper's place.
    score = "general" if local or name == "dot" else name
    attention = LuongConfig(12, 24, score, local, 2, max_length=9 if name == "location" else None)
    return RecurrentModel(config, LuongDecoder(config, attention))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(11, (2, 7), generator=generator), torch.randint(13, (2, 5), generator=generator)


@pytest.mark.parametrize("name", MIXERS)
def test_an_encoder_sees_both_ways_and_no_padding(name: str) -> None:
    model = awake(Encoder(EncoderConfig(11, WIDTH, 2), lambda i: MIXERS[name](False)))
    source, _ = batch()
    found = model(source, mask=KEEP)
    assert found.shape == (2, 7, WIDTH)
    assert (found[1:, :4] - model(source[1:, :4])).abs().max() < 1e-12
    changed = source.clone()
    changed[0, -1] += 1
    assert (model(changed % 11)[0, 0] - model(source)[0, 0]).abs().max() > 1e-6


def test_an_encoder_of_vectors() -> None:
    model = Encoder(EncoderConfig(4, WIDTH, 1, vectors=True), lambda i: MIXERS["softmax"](False))
    assert model(torch.randn(3, 6, 4)).shape == (3, 6, WIDTH)


@pytest.mark.parametrize("name", MIXERS)
def test_steps_equal_teacher_forcing(name: str) -> None:
    model = awake(encoder_decoder(name))
    source, tokens = batch()
    whole = model(source, tokens, mask=KEEP)
    seen, state, rows = model.encoder(source, mask=KEEP), model.state(2, 5), []
    for part in tokens.split([2, 1, 2], 1):
        logits, state = model.step(part, seen, state, mask=KEEP)
        rows.append(logits)
    assert (torch.cat(rows, 1) - whole).abs().max() < 1e-12
    alone = model(source[1:, :4], tokens[1:])
    assert (whole[1:] - alone).abs().max() < 1e-12


@pytest.mark.parametrize("name", MIXERS)
def test_generation_is_the_likeliest_row_of_each_pass(name: str) -> None:
    model = awake(encoder_decoder(name))
    source, tokens = batch()
    found = model.generate(source, tokens[:, :2], 4, mask=KEEP)
    assert found.shape == (2, 6)
    assert torch.equal(model(source, found[:, :-1], mask=KEEP)[:, 1:].argmax(-1), found[:, 2:])


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_generation_is_the_likeliest_row_and_padding_is_not_read(name: str) -> None:
    model = recurrent(name).double()
    source, tokens = batch()
    found = model.generate(source, tokens[:, :2], 4, lengths=LENGTHS)
    whole = model(source, found[:, :-1], lengths=LENGTHS)
    assert torch.equal(whole[:, 1:].argmax(-1), found[:, 2:])
    alone = model(source[1:, :4], found[1:, :-1], lengths=LENGTHS[1:])
    assert (whole[1:] - alone).abs().max() < 1e-12
    weights = model.alignment(source, tokens, lengths=LENGTHS)
    assert weights.shape == (2, 5, 7)
    assert not weights[1, :, 4:].any()
    if not name.startswith("local"):
        assert (weights.sum(-1) - 1).abs().max() < 1e-12


def fitted(model: nn.Module, rate: float) -> float:
    """Share of right tokens after learning one batch by heart."""
    source, tokens = batch()
    lengths = {"lengths": LENGTHS} if isinstance(model, RecurrentModel) else {"mask": KEEP}
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(80):
        logits = model(source, tokens[:, :-1], **lengths)
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = model.generate(source, tokens[:, :1], 4, **lengths)
    return (found == tokens).double().mean().item()


@pytest.mark.parametrize("name", MIXERS)
def test_an_encoder_decoder_learns_a_batch(name: str) -> None:
    assert fitted(encoder_decoder(name), 1e-2) == 1


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_model_learns_a_batch(name: str) -> None:
    assert fitted(recurrent(name), 2e-2) == 1


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the encoder has width 8 and the decoder 16, expected one"):
        EncoderDecoderConfig(EncoderConfig(11, 8, 1), DecoderConfig(13, 16, 1))
    with pytest.raises(ValueError, match="layers is 0, expected at least 1"):
        EncoderConfig(11, 8, 0)
    with pytest.raises(ValueError, match="hidden is 0, expected at least 1"):
        RecurrentConfig(11, 13, 8, 0)
    with pytest.raises(ValueError, match="attention has width 12 and context 12, expected 12 and 24"):
        LuongDecoder(RecurrentConfig(11, 13, 8, 12), LuongConfig(12))
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 0\), expected \(b, m\) with at least 1 token"):
        recurrent("additive").generate(batch()[0], torch.zeros(2, 0, dtype=torch.int64), 3)
