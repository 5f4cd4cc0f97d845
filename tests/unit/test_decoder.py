"""The decoder: cached and uncached sampling agree, rows get equal parameters, bad arguments are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnkit.compare import rows
from attnkit.models.decoder import Decoder, DecoderConfig, Mixer, match_parameters, parameters
from attnkit.spec import LayerPlace
from attnkit.testing.budgets import assert_within

WIDTH, HEADS, LAYERS, WINDOW, VOCAB = 32, 4, 3, 8, 50
ROWS = [row.name for row in rows.known()]


def mixer(name: str, width: int = WIDTH, layers: int = LAYERS) -> Mixer:
    (row,) = rows.select([name])
    return lambda layer: row.layer(LayerPlace(width, HEADS, WINDOW, layer, layers))


def decoder(name: str) -> Decoder:
    """A decoder whose layers do something: fresh ones start as the identity."""
    model = Decoder(DecoderConfig(VOCAB, WIDTH, LAYERS), mixer(name))
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_sampling_gives_the_same_tokens_with_and_without_cache(name: str, temperature: float) -> None:
    model, prompt = decoder(name), torch.randint(VOCAB, (3, 11))
    cached = model.generate(prompt, 20, temperature=temperature, top_k=10, seed=3)
    uncached = model.generate(prompt, 20, temperature=temperature, top_k=10, seed=3, cache=False)
    assert cached.tolist() == uncached.tolist()
    assert cached.shape == (3, 31)
    assert cached[:, :11].tolist() == prompt.tolist()


@pytest.mark.parametrize("name", ROWS)
def test_any_split_into_steps_gives_the_logits_of_one_pass(name: str) -> None:
    model, tokens = decoder(name).eval(), torch.randint(VOCAB, (2, 23))
    with torch.no_grad():
        whole = model(tokens)
        gold = model.double()(tokens)
        model.float()
        state, parts = model.state(2, 23), []
        for piece in tokens.split([7, 1, 1, 9, 5], 1):
            logits, state = model.step(piece, state)
            parts.append(logits)
    assert_within(torch.cat(parts, 1), gold, whole, torch.float32)


@pytest.mark.parametrize("name", ROWS)
def test_rows_train_under_autocast(name: str) -> None:
    """As ``attnkit compare`` trains them: linear maps return bfloat16, norms and parameters are float32."""
    model, tokens = decoder(name).train(), torch.randint(VOCAB, (2, 40))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
    logits.float().logsumexp(-1).sum().backward()
    # No gradient reaches the indexer of CSA, which chooses; every other parameter must have one.
    slopes = {name: x.grad for name, x in model.named_parameters() if x.requires_grad and ".indexer." not in name}
    assert [name for name, slope in slopes.items() if slope is None or not slope.isfinite().all()] == []


def test_a_fresh_decoder_predicts_from_its_last_token_alone() -> None:
    model, tokens = Decoder(DecoderConfig(VOCAB, WIDTH, LAYERS), mixer("mha")), torch.randint(VOCAB, (1, 9))
    changed = tokens.clone()
    changed[0, :-1] = (tokens[0, :-1] + 1) % VOCAB
    assert model(tokens)[0, -1].tolist() == model(changed)[0, -1].tolist()


def test_a_fresh_decoder_has_logits_of_unit_scale_at_any_width() -> None:
    for width in (32, 256):
        model = Decoder(DecoderConfig(1000, width, 2), mixer("mha", width, 2))
        logits = model(torch.arange(100)[None])[0]
        logits[torch.arange(100), torch.arange(100)] = torch.nan  # a token resembles itself
        assert 0.9 < logits[~logits.isnan()].std() < 1.1


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("width", "layers"), [(64, 2), (192, 2), (256, 4)])
def test_rows_get_the_parameters_of_mha(name: str, width: int, layers: int) -> None:
    config = DecoderConfig(2048, width, layers)
    target = parameters(Decoder(config, mixer("mha", width, layers)))
    matched = match_parameters(config, mixer(name, width, layers), target)
    assert abs(parameters(Decoder(matched, mixer(name, width, layers))) - target) <= 0.005 * target


def test_a_target_out_of_reach_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"nearest decoder has \d+ parameters.*expected within 0.5 % of 100"):
        match_parameters(DecoderConfig(VOCAB, WIDTH, LAYERS), mixer("mha"), 100)


def test_the_seed_decides_what_is_drawn() -> None:
    model, prompt = decoder("mha"), torch.randint(VOCAB, (1, 4))
    first, again, other = (model.generate(prompt, 30, temperature=1.0, seed=seed).tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_top_1_is_greedy() -> None:
    model, prompt = decoder("mha"), torch.randint(VOCAB, (2, 4))
    assert model.generate(prompt, 9, temperature=2.0, top_k=1).tolist() == model.generate(prompt, 9).tolist()


def test_generate_leaves_the_mode_of_the_model() -> None:
    model = decoder("mha").train()
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 1)
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": -1}, "count is -1, expected at least 0"),
        ({"count": 1, "temperature": -1.0}, "temperature is -1.0, expected at least 0"),
        ({"count": 1, "top_k": 0}, "top_k is 0, expected at least 1 or None"),
    ],
)
def test_bad_sampling_arguments_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder("mha").generate(torch.zeros(1, 1, dtype=torch.int64), **settings)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 0\), expected \(b, n\) with at least 1 token"):
        decoder("mha").generate(torch.zeros(2, 0, dtype=torch.int64), 1)


@pytest.mark.parametrize("name", ["vocab", "width", "layers", "hidden"])
def test_sizes_below_one_are_refused(name: str) -> None:
    sizes = {"vocab": 5, "width": 4, "layers": 1, "hidden": 3} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        DecoderConfig(**sizes)
