"""Longformer attention: nested loops, Hugging Face's model, limits, blocks, bounded memory, encoders, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit
from attnkit.mechanisms.longformer import LongformerAttention, LongformerConfig, longformer_attention
from attnkit.mechanisms.longformer.chunk import BLOCK
from attnkit.models.encoder import Encoder, EncoderConfig
from attnkit.positions import Rotary
from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing.budgets import assert_within

BACKENDS = ("chunk", "reference")


def sampled(n: int, seed: int = 1, **sizes: int) -> dict[str, Any]:
    return get("longformer").sample(
        seed, Sizes(**{"b": 2, "h": 4, "g": 2, "n": n, "d": 5, "e": 3, **sizes}), torch.float64
    )


def by_loops(call: dict[str, Any], scale: float) -> Tensor:
    """One pair at a time; a token's own set of keys is a set, so that none is in it twice."""
    q, k, v = call["q"], call["k"], call["v"]
    (b, h, n, _), (g, e) = q.shape, (k.shape[1], v.shape[3])
    o = q.new_zeros(b, h, n, e)
    for batch in range(b):
        real = {j for j in range(n) if "keep" not in call or call["keep"][batch, j]}
        places = {int(p): c for c, p in enumerate(call["global_positions"][batch]) if int(p) in real}
        for i in real:
            for head in range(h):
                keys, values, query = k[batch, head // (h // g)], v[batch, head // (h // g)], q[batch, head, i]
                seen = real & ({*range(i - call["radius"], i + call["radius"] + 1)} | places.keys())
                if i in places:
                    keys, values = call["global_k"][batch, head // (h // g)], call["global_v"][batch, head // (h // g)]
                    query, seen = call["global_q"][batch, head, places[i]], real
                weights = {j: math.exp(scale * float(query @ keys[j])) for j in seen}
                for j, weight in weights.items():
                    o[batch, head, i] += weight / sum(weights.values()) * values[j]
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_equals_nested_loops(backend: str, seed: int) -> None:
    inputs = sampled(15, seed) | {"radius": seed}
    found = longformer_attention(**inputs, scale=0.6, backend=backend)
    assert (found - by_loops(inputs, 0.6)).abs().max() < 1e-12


@pytest.mark.parametrize(("n", "radius"), [(BLOCK - 1, 5), (BLOCK + 1, BLOCK), (2 * BLOCK, 7), (2 * BLOCK + 1, 1000)])
def test_blocks_equal_the_definition_with_gradients(n: int, radius: int) -> None:
    inputs = sampled(n) | {"radius": radius}
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    found, true = (longformer_attention(**inputs, backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-12
    direction = torch.randn_like(found)
    slopes, exact = (torch.autograd.grad(o, list(leaves.values()), direction) for o in (found, true))
    for name, one, two in zip(leaves, slopes, exact, strict=True):
        assert (one - two).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_all_without_global_tokens_is_softmax_attention(backend: str) -> None:
    inputs = sampled(BLOCK + 9, 0) | {"radius": 1000}
    inputs["global_positions"].fill_(-1)
    found = longformer_attention(**inputs, backend=backend)
    assert (found - attnkit.softmax_attention(inputs["q"], inputs["k"], inputs["v"])).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_global_is_softmax_attention_of_the_global_projections(backend: str) -> None:
    inputs = sampled(9, 0)
    order = torch.randperm(9).expand(2, -1)
    inputs |= {"global_q": torch.randn(2, 4, 9, 5, dtype=torch.float64), "global_positions": order}
    found = longformer_attention(**inputs, backend=backend)
    true = attnkit.softmax_attention(inputs["global_q"], inputs["global_k"], inputs["global_v"])
    assert (found[:, :, order[0]] - true).abs().max() < 1e-12


def test_long_input_builds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest logits within a long call are those of one block over its windows and the global keys."""
    from attnkit.mechanisms.longformer import chunk

    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        seen.append((q.shape[2], k.shape[2]))
        return attnkit.softmax_attention(q, k, v, **settings)

    monkeypatch.setattr(chunk, "softmax_attention", watched)
    inputs = sampled(5 * BLOCK)
    inputs["q"].requires_grad_()
    longformer_attention(**inputs).sum().backward()
    assert max(rows * keys for rows, keys in seen) == BLOCK * (BLOCK + 2 * inputs["radius"] + 2)
    assert len(seen) == 5 + 1 + 5, "the backward computes each block again and keeps none"


def huggingface(window: int) -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="transformers, the oracle of Longformer, is not installed"
    )
    config = transformers.LongformerConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8,
        attention_window=window, max_position_embeddings=64, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LongformerModel(config).eval()


def loaded(theirs: nn.Module, radius: int) -> LongformerAttention:
    """Our layer with the weights of one of theirs, ``LongformerAttention`` as well."""
    layer = LongformerAttention(LongformerConfig(16, 4, radius, bias=True))
    maps = {"q": "query", "k": "key", "v": "value"}
    for ours, name in {**maps, **{f"global_{one}": f"{name}_global" for one, name in maps.items()}}.items():
        getattr(layer, ours).load_state_dict(theirs.self.get_submodule(name).state_dict())
    layer.o.load_state_dict(theirs.output.dense.state_dict())
    return layer


def test_equals_huggingface_with_padding_and_global_tokens() -> None:
    """Both layers of a model whose 37 tokens are no multiple of its window of 8, with two, one and no global tokens."""
    model = huggingface(8)
    keep = torch.arange(37) < torch.tensor([[37], [30], [21]])
    marked = torch.zeros(3, 37, dtype=torch.bool)
    marked[0, [0, 20]] = marked[1, 3] = True
    seen: list[tuple[Any, Tensor, Tensor]] = []
    for block in model.encoder.layer:
        entered: list[Tensor] = []
        block.attention.self.register_forward_pre_hook(lambda _, x, e=entered: e.append(x[0].clone()))
        block.attention.output.dense.register_forward_hook(
            lambda _, __, y, e=entered, a=block.attention: seen.append((a, e[0][:, :37], y[:, :37]))
        )
    with torch.no_grad():
        model(torch.randint(2, 50, (3, 37)), attention_mask=keep.long(), global_attention_mask=marked.long())
        assert len(seen) == 2
        for attention, x, y in seen:
            layer, twin = loaded(attention, 4), loaded(attention, 4).double()
            arguments = {"mask": attnkit.padding(keep), "global_tokens": marked}
            gold, naive = twin(x.double(), **arguments), layer(x, **arguments)
            assert_within(y[keep], gold[keep], naive[keep], torch.float32, what="Hugging Face's layer")
            for backend in ("cpu", "reference"):
                layer.config = LongformerConfig(16, 4, 4, bias=True, backend=backend)
                assert_within(layer(x, **arguments)[keep], gold[keep], y[keep].clone(), torch.float32, what=backend)


def test_global_projections_start_as_copies() -> None:
    layer = LongformerAttention(LongformerConfig(16, 4, kv_heads=2, bias=True))
    for name in ("q", "k", "v"):
        one, other = getattr(layer, name).weight, getattr(layer, f"global_{name}").weight
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("rotary", [None, Rotary(8)], ids=["no positions", "rotary"])
def test_in_an_encoder_padding_changes_nothing(rotary: Rotary | None) -> None:
    torch.manual_seed(0)
    config = LongformerConfig(16, 2, radius=2, global_tokens=(0, 3, 40), rotary=rotary)
    model = Encoder(EncoderConfig(11, 16, 2), lambda i: LongformerAttention(config))
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.3)
    model.double()
    source = torch.randint(11, (2, 12))
    found = model(source, mask=attnkit.padding(torch.arange(12) < torch.tensor([[12], [7]])))
    assert (found[1:, :7] - model(source[1:, :7])).abs().max() < 1e-12
    changed = source.clone()
    changed[0, -1] += 1
    reached = (model(changed % 11) - model(source))[0].abs().amax(-1) > 1e-9
    assert bool(reached.all()), "through a global token every token hears of every other within two layers"


def test_rotary_turns_global_queries_by_their_place() -> None:
    """Copies of the local projections, and a window over all: global or not makes no difference then."""
    layer = LongformerAttention(LongformerConfig(16, 2, radius=20, rotary=Rotary(8))).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    marked = torch.zeros(2, 12, dtype=torch.bool)
    plain = layer(x, global_tokens=marked.clone())
    marked[0, 7] = marked[1, 2] = marked[1, 9] = True
    assert (layer(x, global_tokens=marked) - plain).abs().max() < 1e-12


WRONG = {"global_positions": torch.tensor([[0, 15], [3, -1]])}
REFUSALS = [
    (WRONG, ValueError, "global_positions holds 15, expected 0 to 14, or -1 for none"),
    ({"global_positions": torch.tensor([[0, -2], [3, -1]])}, ValueError, "global_positions holds -2, expected 0 to 14"),
    ({"global_positions": torch.tensor([[4, 4], [-1, -1]])}, ValueError, "global_positions holds 4 twice"),
    ({"global_positions": torch.zeros(2, 2)}, TypeError, "global_positions has dtype torch.float32, expected integers"),
    ({"global_positions": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "globals is 3 in global_positions (2, 3)"),
    ({"keep": torch.ones(2, 15)}, TypeError, "keep has dtype torch.float32, expected bool"),
    ({"radius": -1}, ValueError, "radius is -1, expected at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        longformer_attention(**{**sampled(15), **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_kind_and_marks_of_another_shape_are_refused() -> None:
    layer, x = LongformerAttention(LongformerConfig(8, 2)), torch.randn(1, 5, 8)
    with pytest.raises(NotImplementedError, match=r"got the mask causal\(\), expected attnkit.padding\(keep\)"):
        layer(x, mask=attnkit.causal())
    with pytest.raises(ValueError, match=r"torch.bool of shape \(5,\), expected torch.bool of shape \(1, 5\)"):
        layer(x, global_tokens=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="rotary is made for head size 8, heads have 4"):
        LongformerConfig(8, 2, rotary=Rotary(8))
