"""BigBird attention: nested loops, Hugging Face's module, the mask of its name, draws, blocks, encoders, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attnkit
from attnkit.masks import random_blocks
from attnkit.mechanisms.bigbird import BigBirdAttention, BigBirdConfig, bigbird_attention
from attnkit.mechanisms.bigbird.chunk import TOGETHER
from attnkit.models.encoder import Encoder, EncoderConfig
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing.budgets import assert_within

BACKENDS = ("chunk", "reference")


def sampled(n: int, seed: int = 1) -> dict[str, Any]:
    return get("bigbird").sample(seed, Sizes(b=2, h=4, g=2, n=n, d=5, e=3), torch.float64)


def by_loops(call: dict[str, Any], scale: float, block: int, window: int) -> Tensor:
    """One pair at a time; the blocks that a block sees are a set."""
    q, k, v = call["q"], call["k"], call["v"]
    (b, h, n, _), (g, e) = q.shape, (k.shape[1], v.shape[3])
    o, last = q.new_zeros(b, h, n, e), (n - 1) // block
    for batch in range(b):
        real = [j for j in range(n) if "keep" not in call or call["keep"][batch, j]]
        for head in range(h):
            for i in real:
                own = i // block
                blocks = {0, last, *range(own - window // 2, own + window // 2 + 1)}
                blocks |= {int(x) for x in call["random_blocks"][head, own]}
                if own in (0, last):
                    blocks = set(range(last + 1))
                weights = {
                    j: math.exp(scale * float(q[batch, head, i] @ k[batch, head // (h // g), j]))
                    for j in real
                    if j // block in blocks
                }
                for j, weight in weights.items():
                    o[batch, head, i] += weight / sum(weights.values()) * v[batch, head // (h // g), j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "window", "random"), [(1, 3, 2), (5, 3, 1), (23, 3, 2), (24, 1, 1), (27, 5, 0)])
def test_equals_nested_loops(backend: str, n: int, window: int, random: int) -> None:
    inputs = sampled(n)
    inputs["random_blocks"] = random_blocks(-(-n // 3), window=window, random=random, heads=4)
    found = bigbird_attention(**inputs | {"block": 3, "window": window}, scale=0.6, backend=backend)
    assert (found - by_loops(inputs, 0.6, 3, window)).abs().max() < 1e-12


@pytest.mark.parametrize("blocks", [2, 3, TOGETHER + 2, TOGETHER + 3, 2 * TOGETHER + 7])
def test_gathered_blocks_equal_the_definition_with_gradients(blocks: int) -> None:
    inputs = sampled(4 * blocks - 1)
    leaves = {name: inputs[name].requires_grad_() for name in "qkv"}
    found, true = (bigbird_attention(**inputs, backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-12
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (found, true))
    for name, one, two in zip(leaves, slopes, exact, strict=True):
        assert (one - two).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_softmax_attention_under_the_mask_of_the_same_seed(backend: str) -> None:
    inputs = sampled(90, 0)
    inputs["random_blocks"] = random_blocks(23, random=3, heads=4, seed=5)
    mask = attnkit.bigbird(90, 4, random=3, heads=4, seed=5)
    found = bigbird_attention(**inputs, backend=backend)
    assert (found - attnkit.softmax_attention(inputs["q"], inputs["k"], inputs["v"], mask=mask)).abs().max() < 1e-12


def test_long_input_builds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call within a long one has eight blocks of keys, but for the two blocks that see everything."""
    from attnkit.mechanisms.bigbird import chunk

    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        seen.append((len(q), q.shape[2], k.shape[2]))
        return attnkit.softmax_attention(q, k, v, **settings)

    monkeypatch.setattr(chunk, "softmax_attention", watched)
    blocks = 3 * TOGETHER + 2
    inputs = sampled(4 * blocks, 0) | {"random_blocks": random_blocks(blocks, heads=4)}
    inputs["q"].requires_grad_()
    bigbird_attention(**inputs).sum().backward()
    assert seen.count((2, 2 * 4, 4 * blocks)) == 1
    assert seen.count((2 * TOGETHER, 4, 8 * 4)) == 6, "the backward gathers each part again and keeps none"
    assert len(seen) == 7


@pytest.mark.parametrize("window", [1, 3, 5])
def test_random_blocks_are_drawn_from_those_that_are_not_seen_anyway(window: int) -> None:
    """Without replacement, each of the others as likely, none where nothing is left; replayed by the seed."""
    heads, blocks = 3000, 9
    drawn = random_blocks(blocks, window=window, random=2, heads=heads, seed=3)
    for row in range(blocks):
        near = {0, blocks - 1, *range(row - window // 2, row + window // 2 + 1)}
        others = [] if row in (0, blocks - 1) else [block for block in range(blocks) if block not in near]
        counts = torch.stack([(drawn[:, row] == block).sum() for block in range(blocks)])
        assert {i for i, count in enumerate(counts) if count} == set(others)
        assert int(counts.sum()) == heads * min(2, len(others))
        assert bool((drawn[:, row, 0] != drawn[:, row, 1]).all()) or not others
        # A share of p has standard deviation sqrt(p (1 - p) / 3000), 0.9 % at most: this is five of them.
        assert all(abs(counts[i] / heads - min(2, len(others)) / len(others)) < 0.046 for i in others)
    assert torch.equal(drawn, random_blocks(blocks, window=window, random=2, heads=heads, seed=3))
    assert not torch.equal(drawn, random_blocks(blocks, window=window, random=2, heads=heads, seed=4))


def huggingface(n: int) -> tuple[Any, Any]:
    """Hugging Face's module and the random blocks that it draws in training for ``n`` tokens, as ours are given."""
    pytest.importorskip("transformers", reason="transformers, the oracle of BigBird, is not installed")
    from transformers.models.big_bird import modeling_big_bird as theirs

    config = theirs.BigBirdConfig(
        hidden_size=16, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8, vocab_size=50, block_size=4,
        num_random_blocks=2, max_position_embeddings=128, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = theirs.BigBirdModel(config)
    # In evaluation it takes block 0 for every random one, and so counts block 0 three times; only training draws.
    model.train()
    attention = model.encoder.layer[0].attention.self
    np.random.seed(attention.seed)
    lengths, counts = attention._get_rand_attn_plan(n, 4, 2)
    drawn = attention._bigbird_block_rand_mask_with_head(n, n, 4, 4, 4, lengths, counts)
    return model, torch.nn.functional.pad(torch.tensor(np.stack(drawn)).long(), (0, 0, 1, 1), value=-1)


def test_equals_huggingface_with_padding() -> None:
    """The module within a model, 60 tokens in 15 blocks, the blocks that it drew, its weights."""
    model, drawn = huggingface(60)
    block = model.encoder.layer[0]
    entered: list[Tensor] = []
    found: list[Tensor] = []
    block.attention.self.register_forward_pre_hook(lambda _, x: entered.append(x[0]))
    block.attention.output.dense.register_forward_pre_hook(lambda _, x: found.append(x[0]))
    keep = torch.arange(60) < torch.tensor([[60], [43]])
    with torch.no_grad():
        model(torch.randint(2, 50, (2, 60)), attention_mask=keep.long())
    (x,), (theirs,) = entered, found
    assert not theirs[~keep].any(), "padding has rows of 0 there as well"
    state = {name: getattr(block.attention.self, name).state_dict() for name in ("query", "key", "value")}

    def ours(x: Tensor, backend: str) -> Tensor:
        heads = []
        for name in state:
            linear = nn.Linear(16, 16)
            linear.load_state_dict(state[name])
            heads.append(linear.to(x.dtype)(x).unflatten(-1, (4, 4)).transpose(1, 2))
        with torch.no_grad():
            o = bigbird_attention(*heads, drawn, block=4, keep=keep, backend=backend)
        return o.transpose(1, 2).flatten(2)

    with torch.no_grad():
        gold, naive = ours(x.double(), "reference"), ours(x, "reference")
        assert_within(theirs, gold, naive, torch.float32, what="Hugging Face's module")
        for backend in ("cpu", "chunk"):
            assert_within(ours(x, backend), gold, theirs.clone(), torch.float32, what=backend)


def test_short_input_is_attended_to_in_full() -> None:
    """Up to 2 r + 5 blocks, as in the released models; one block more is sparse."""
    layer = BigBirdAttention(BigBirdConfig(16, 2, block=4, random=1)).double()
    x = torch.randn(1, 29, 16, dtype=torch.float64)
    for n, full in ((1, True), (28, True), (29, False)):
        q, k, v = (linear(x[:, :n]).unflatten(-1, (2, 8)).transpose(1, 2) for linear in (layer.q, layer.k, layer.v))
        true = layer.o(attnkit.softmax_attention(q, k, v).transpose(1, 2).flatten(2))
        assert ((layer(x[:, :n]) - true).abs().max() < 1e-12) == full


@pytest.mark.parametrize("rotary", [None, Rotary(8)], ids=["no positions", "rotary"])
def test_in_an_encoder(rotary: Rotary | None) -> None:
    """Padding is not read, layers draw blocks of their own, evaluation repeats what training saw."""
    torch.manual_seed(0)
    made = [BigBirdConfig(16, 2, block=2, random=1, seed=layer, rotary=rotary) for layer in range(2)]
    model = Encoder(EncoderConfig(11, 16, 2), lambda i: BigBirdAttention(made[i]))
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.3)
    model.double()
    source = torch.randint(11, (2, 30))
    mask = attnkit.padding(torch.arange(30) < torch.tensor([[30], [17]]))
    found = model(source, mask=mask)
    changed = source.clone()
    changed[1, 17:] = (changed[1, 17:] + 1) % 11
    assert torch.equal(model(changed, mask=mask)[1, :17], found[1, :17])
    assert torch.equal(model.eval()(source, mask=mask), found)
    other = Encoder(EncoderConfig(11, 16, 2), lambda i: BigBirdAttention(made[0])).double()
    other.load_state_dict(model.state_dict())
    assert not torch.equal(other(source, mask=mask), found)


def blocks_with(*wrong: tuple[int, int, int], value: int) -> Tensor:
    drawn = random_blocks(6, random=2, heads=4).clone()
    drawn[:, 1] = torch.tensor([3, 4])
    for place in wrong:
        drawn[place] = value
    return drawn


REFUSALS = [
    ({"random_blocks": blocks_with((2, 1, 0), value=2)}, ValueError, "holds 2 for block 1 of head 2, expected -1, or"),
    ({"random_blocks": blocks_with((0, 1, 0), value=0)}, ValueError, "holds 0 for block 1 of head 0"),
    ({"random_blocks": blocks_with((0, 1, 0), value=5)}, ValueError, "holds 5 for block 1 of head 0"),
    ({"random_blocks": blocks_with((0, 1, 0), value=4)}, ValueError, "holds 4 for block 1 of head 0"),
    ({"random_blocks": blocks_with((0, 1, 0), value=-2)}, ValueError, "holds -2 for block 1 of head 0"),
    ({"random_blocks": random_blocks(7, heads=4)}, ValueError, "has shape (4, 7, 3), expected (4 or 1, 6, r)"),
    ({"random_blocks": torch.zeros(4, 6, 2)}, TypeError, "random_blocks has dtype torch.float32, expected integers"),
    ({"window": 2}, ValueError, "block is 4 and window 2, expected at least 1, the window an odd number"),
    ({"keep": torch.ones(2, 23)}, TypeError, "keep has dtype torch.float32, expected bool"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        bigbird_attention(**{**sampled(23), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_masks_and_draws_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"got the mask causal\(\), expected attnkit.padding\(keep\)"):
        BigBirdAttention(BigBirdConfig(8, 2))(torch.randn(1, 5, 8), mask=attnkit.causal())
    with pytest.raises(ValueError, match="window is 2, expected an odd number of blocks"):
        attnkit.bigbird(64, 8, window=2)
    with pytest.raises(ValueError, match="random is -1, expected at least 0"):
        random_blocks(8, random=-1)
    with pytest.raises(ValueError, match="rotary is made for head size 8, heads have 4"):
        BigBirdConfig(8, 2, rotary=Rotary(8))
