"""Compressed attention: loops for each step, block edges, ties, limits, states of every kind, cost, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.compressed import CompressedConfig, choose, chunk, compress, compressed_attention, pooling
from attnkit.positions import Rotary, YaRN
from attnkit.registry import get
from attnkit.state import CompressedState
from attnkit.testing import assert_matches

BACKENDS = ("chunk", "reference")
KINDS = ("sliding", "csa", "hca")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(n: int, m: int, *, rate: int, top: int | None, size: int = 3) -> dict[str, Any]:
    """A call with two KV heads, more entries than are closed, and random entries chosen, some of them none or open."""
    count = n // rate + 1
    call = {"q": drawn(2, 4, m, size), "kv": drawn(2, 2, n, size, seed=1), "sink": drawn(4, seed=3), "rate": rate}
    call["entries"] = drawn(2, 2, count, size, seed=2)
    if top is not None:
        order = torch.stack([torch.stack([torch.randperm(count) for _ in range(m)]) for _ in range(2)])
        call["chosen"] = (order[..., :top] - 1).sort(-1).values
    return call


def by_loops(call: dict[str, Any], window: int, scale: float) -> Tensor:
    """One query at a time, with the tokens of each entry counted one by one."""
    q, kv, entries, rate = (call[name] for name in ("q", "kv", "entries", "rate"))
    (b, h, m, _), n, o = q.shape, kv.shape[2], torch.zeros_like(q)
    for batch, head, i in ((x, y, z) for x in range(b) for y in range(h) for z in range(m)):
        t, group = n - m + i, head // 2
        seen = [kv[batch, group, j] for j in range(n) if t - window < j <= t]
        for w in range(entries.shape[2]):
            whole = all(token <= t for token in range(w * rate, (w + 1) * rate))
            if whole and ("chosen" not in call or w in call["chosen"][batch, i].tolist()):
                seen.append(entries[batch, group, w])
        weights = [math.exp(scale * float(q[batch, head, i] @ x)) for x in seen]
        total = sum(weights) + math.exp(call["sink"][head])
        for weight, x in zip(weights, seen, strict=True):
            o[batch, head, i] += weight / total * x
    return o


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m", "rate", "window", "top"), [(9, 9, 4, 3, None), (9, 2, 2, 1, 2), (8, 5, 1, 20, 3)])
def test_equals_loops(backend: str, n: int, m: int, rate: int, window: int, top: int | None) -> None:
    call = sampled(n, m, rate=rate, top=top)
    found = compressed_attention(**call, window=window, scale=0.6, backend=backend)
    assert (found - by_loops(call, window, 0.6)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("t", "rate", "seen"), [(2, 4, []), (3, 4, [0]), (6, 4, [0]), (7, 4, [0, 1]), (126, 128, []), (127, 128, [0])]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_sees_the_entries_of_whole_windows(backend: str, t: int, rate: int, seen: list[int]) -> None:
    marks = torch.eye(4, dtype=torch.float64)[None, None]
    entries = marks[:, :, 1:]
    kv = marks[:, :, :1].expand(1, 1, t + 1, 4)
    o = compressed_attention(torch.zeros_like(kv), kv, entries, window=1, rate=rate, backend=backend)[0, 0, -1]
    assert (o[1:] > 0).nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("m", [1, 7, chunk.BLOCK, 2 * chunk.BLOCK + 1])
@pytest.mark.parametrize(("window", "rate", "top"), [(5, 4, None), (130, 2, 9), (1, 1, 4), (30, 1, 20)])
def test_blocks_equal_the_definition_with_gradients(m: int, window: int, rate: int, top: int | None) -> None:
    """Across block edges in float64, where entries are fetched and where they are hidden."""
    call = sampled(2 * chunk.BLOCK + 3, m, rate=rate, top=top)
    leaves = {name: call[name].requires_grad_() for name in ("q", "kv", "entries", "sink")}
    found, true = (compressed_attention(**call, window=window, backend=backend) for backend in BACKENDS)
    assert (found - true).abs().max() < 1e-12
    slopes, exact = (torch.autograd.grad(o, list(leaves.values()), drawn(*found.shape)) for o in (found, true))
    for name, one, two in zip(leaves, slopes, exact, strict=True):
        assert (one - two).abs().max() < 1e-10, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend: str) -> None:
    """Without entries a window; all entries chosen as none chosen; entries of one token and no window, MQA."""
    call = sampled(40, 40, rate=1, top=None)
    q, kv, sink, entries = (call[name] for name in ("q", "kv", "sink", "entries"))
    alone = compressed_attention(q, kv, sink=sink, window=7, backend=backend)
    assert (alone - attnkit.softmax_attention(q, kv, kv, mask=attnkit.window(7), sink=sink)).abs().max() < 1e-12
    every = torch.arange(entries.shape[2]).expand(2, 40, -1)
    dense = compressed_attention(**call, window=7, backend=backend)
    assert (compressed_attention(**call, chosen=every, window=7, backend=backend) - dense).abs().max() < 1e-12
    none = torch.full((2, 40, 1), -1)
    assert (compressed_attention(**call, chosen=none, window=7, backend=backend) - alone).abs().max() < 1e-12
    wide = compressed_attention(q, kv, sink=sink, window=1000, backend=backend)
    assert (wide - attnkit.softmax_attention(q, kv, kv, mask=attnkit.causal(), sink=sink)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top", [None, 4])
def test_logits_of_ten_thousand_stay_finite(dtype: torch.dtype, top: int | None) -> None:
    """Products beyond float16, in blocks that hide and in blocks that fetch."""
    call = sampled(130, 130, rate=2, top=top, size=17)
    given = {name: x.to(dtype) if name in ("q", "kv", "entries") else x for name, x in call.items()}
    given |= {"q": given["q"] * 100, "kv": given["kv"] * 100, "entries": given["entries"] * 100, "window": 9}
    assert_matches(get("compressed"), "chunk", given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top", [None, 1])
def test_no_queries_and_no_sequences_are_an_empty_result(backend: str, top: int | None) -> None:
    call = sampled(9, 9, rate=2, top=top)
    no_sequences = {name: x[:0] for name, x in call.items() if name not in ("rate", "sink")}
    no_queries = {name: call[name][..., :0, :] for name in ("q", "chosen") if name in call}
    for cut in (no_sequences, no_queries):
        o = compressed_attention(**{**call, **cut}, window=3, backend=backend)
        assert o.shape == cut["q"].shape


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n", [3, 4, 11])
def test_compress_equals_loops(overlap: bool, n: int) -> None:
    rate, d = 4, 3
    values, gates = drawn(2, 1, n, 2 * d if overlap else d), drawn(2, 1, n, 2 * d if overlap else d, seed=1)
    bias = drawn(rate, values.shape[3], seed=2)
    found = compress(values, gates, bias, overlap=overlap)
    assert found.shape == (2, 1, n // rate, d)
    for batch, w, channel in ((b, w, c) for b in range(2) for w in range(n // rate) for c in range(d)):
        slots = [(w * rate + j, j, channel + d * overlap) for j in range(rate)]
        if overlap and w:
            slots += [((w - 1) * rate + j, j, channel) for j in range(rate)]
        weights = [math.exp(gates[batch, 0, t, at] + bias[j, at]) for t, j, at in slots]
        pooled = sum(weight * float(values[batch, 0, t, at]) for weight, (t, _, at) in zip(weights, slots, strict=True))
        assert found[batch, 0, w, channel].item() == pytest.approx(pooled / sum(weights), abs=1e-12)


@pytest.mark.parametrize(("elements", "top"), [(1, 3), (500, 3), (1 << 20, 3), (500, 100)])
def test_choose_equals_loops_and_ties_go_to_the_earlier_entry(
    monkeypatch: pytest.MonkeyPatch, elements: int, top: int
) -> None:
    """Two index heads, so that ReLU makes many scores exactly 0, and keys that repeat; in blocks of any size."""
    monkeypatch.setattr(pooling, "ELEMENTS", elements)
    q, k, weights = drawn(2, 2, 30, 3), drawn(2, 5, 3, seed=1).repeat(1, 2, 1), drawn(2, 2, 30, seed=2)
    found = choose(q, k, weights, rate=4, top=top, length=37)
    assert found.shape == (2, 30, min(top, 10))
    for batch, i in ((b, i) for b in range(2) for i in range(30)):
        closed = (7 + i + 1) // 4
        score = [
            sum(float(weights[batch, a, i]) * max(0.0, float(q[batch, a, i] @ k[batch, w])) for a in range(2))
            for w in range(closed)
        ]
        best = sorted(sorted(range(closed), key=lambda w: (-round(score[w], 9), w))[:top])
        assert [w for w in found[batch, i].tolist() if w >= 0] == best


def layer(kind: Any, **settings: Any) -> Any:
    """A small layer in float64 whose entries, biases and sinks are off their neutral start."""
    sizes = {"window": 5, "rate": {"sliding": None, "csa": 3, "hca": 4}[kind], "top": 3, "groups": 2, "index_size": 6}
    config = CompressedConfig(16, 4, kind=kind, rotary=Rotary(2, style="interleaved"), **(sizes | settings))
    torch.manual_seed(0)
    made = get("compressed").layer(config).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 5, 90])
def test_any_split_gives_the_rows_of_one_pass(kind: str, window: int) -> None:
    """Tokens one by one, and in pieces that end within windows, at their ends and several windows further."""
    made, x, n = layer(kind, window=window), drawn(2, 40, 16), 40
    with torch.no_grad():
        whole = made(x)
        for sizes in ([1] * n, [n], [2, 1, 3, 7, 0, 6, 1, 20]):
            state, rows = made.state(2, n, dtype=torch.float64), []
            for part in x.split(sizes, 1):
                y, state = made.step(part, state)
                state.check()
                rows.append(y)
            assert (torch.cat(rows, 1) - whole).abs().max() < 1e-12, sizes


def test_a_layer_depends_on_distances_alone() -> None:
    """What turning the result back is for: a window of tokens gives the same wherever it stands."""
    made, x = layer("sliding"), drawn(1, 9, 16)  # rows from the fifth on see x alone
    padded = torch.cat([drawn(1, 30, 16, seed=1), x], 1)
    with torch.no_grad():
        assert (made(padded)[:, -5:] - made(x)[:, -5:]).abs().max() < 1e-12


def test_training_reaches_every_parameter_but_the_indexer() -> None:
    made = layer("csa")
    made(drawn(1, 40, 16)).square().sum().backward()
    without = {name for name, weight in made.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert without == {name for name, _ in made.named_parameters() if name.startswith("indexer.")}


@pytest.mark.parametrize(("length", "to", "refused"), [(4, 3, False), (7, 6, True), (6, 5, True), (4, 0, False)])
def test_crop_goes_back_where_nothing_is_lost(length: int, to: int, refused: bool) -> None:
    """With windows of 3: 4 to 3 leaves no window, 7 to 6 has lost a vector of 5, 6 to 5 has made an entry."""
    made, x = layer("csa"), drawn(1, 12, 16)
    state = made.state(1, 12, dtype=torch.float64)
    with torch.no_grad():
        made.step(x[:, :length], state)
        if refused:
            with pytest.raises(ValueError, match=rf"cannot go back from {length} to {to} tokens, .*: crop less, or"):
                state.crop(to)
            return
        state.crop(to)
        found = made.step(x[:, to:], state)[0]
        assert (found - made(x)[:, to:]).abs().max() < 1e-12


def deepseek(kind: Any, **settings: Any) -> CompressedConfig:
    return CompressedConfig(kind=kind, head_size=512, index_heads=64, index_size=128, **settings)


PRO = {"width": 7168, "heads": 128, "query_rank": 1536, "groups": 16, "output_rank": 1024, "top": 1024}
FLASH = {"width": 4096, "heads": 64, "query_rank": 1024, "groups": 8, "output_rank": 1024, "top": 512}


@pytest.mark.parametrize("sizes", [PRO, FLASH], ids=["pro", "flash"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_released_models(kind: str, sizes: dict[str, int]) -> None:
    """Predicted and allocated, a million tokens, without the memory."""
    with torch.device("meta"):
        made = get("compressed").layer(deepseek(kind, **sizes))
    tokens = 1 << 20
    state = made.state(1, tokens, dtype=torch.bfloat16, device="meta")
    assert made.cost(1, tokens, dtype=torch.bfloat16).state_bytes(tokens) == state.nbytes
    entries = {"sliding": 0, "csa": (512 + 128) * tokens // 4, "hca": 512 * tokens // 128}[kind]
    assert 2 * (entries + 127 * 512) <= state.nbytes <= 2 * (entries + 127 * 512) + 2 * 127 * 512 * 2


def test_a_million_tokens_of_pro_take_10_gib() -> None:
    """30 CSA and 31 HCA layers: the published 9.6 GiB."""
    layers = ["hca", "hca", *["hca" if i % 2 else "csa" for i in range(59)]]
    assert layers.count("csa") == 30
    kept = {kind: (512 + 128 * (kind == "csa")) * 2 // (4 if kind == "csa" else 128) for kind in ("csa", "hca")}
    for kind in kept:
        with torch.device("meta"):
            made = get("compressed").layer(deepseek(kind, **PRO))
        assert made.cost(1, 1 << 20, dtype=torch.bfloat16).state_bytes_per_token == kept[kind]
    assert round(sum(kept[kind] for kind in layers) * 2**20 / 2**30, 1) == 9.6


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 23), (23, 23)])
def test_flops_count_the_pairs(m: int, n: int, top: int | None) -> None:
    from attnkit.spec import Sizes

    near = sum(min(t + 1, 6) for t in range(n - m, n))
    closed = [(t + 1) // 4 for t in range(n - m, n)]
    far = sum(closed if top is None else (min(count, top) for count in closed))
    found = get("compressed").cost(Sizes(1, 4, 1, m, n, 8, 8), window=6, rate=4, top=top, index=(3, 5))
    assert found.flops == 4 * 4 * 8 * (near + far) + 2 * 3 * 5 * sum(closed)


def test_long_input_builds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of queries over a window and the entries, or over what it fetches; never all tokens."""
    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        seen.append((tuple(q.shape[:3]), k.shape[2]))
        return attnkit.softmax_attention(q, k, v, **settings)

    monkeypatch.setattr(chunk, "softmax_attention", watched)
    n = 1024
    call = {"q": drawn(1, 2, n, 4), "kv": drawn(1, 1, n, 4), "rate": 4, "entries": drawn(1, 1, n // 4, 4)}
    for chosen in (None, torch.zeros(1, n, 8, dtype=torch.int64)):
        leaf = call["q"].clone().requires_grad_()
        compressed_attention(**{**call, "q": leaf}, chosen=chosen, window=16).sum().backward()
    assert len(seen) == 2 * 2 * n // chunk.BLOCK, "the backward computes each block again and keeps none"
    hiding, fetching = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert {rows for rows, _ in hiding} == {(1, 2, chunk.BLOCK)}
    assert max(keys for _, keys in hiding) == chunk.BLOCK + 15 + n // 4
    assert set(fetching) == {((chunk.BLOCK, 1, 2), 16 + 8)}, "each query alone, its heads in a row, over what it sees"


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rate": None}, ValueError, "got entries alone, expected entries and their rate"),
    ({"entries": None, "chosen": torch.zeros(2, 9, 1).long(), "rate": None}, ValueError, "got chosen alone"),
    ({"rate": 2}, ValueError, "got 3 entries for 9 tokens in windows of 2, expected at least 4"),
    ({"chosen": torch.zeros(2, 9, 1)}, TypeError, "chosen has dtype torch.float32, expected int64"),
    ({"chosen": torch.zeros(2, 8, 1).long()}, ValueError, "queries is 8 in chosen"),
    ({"length": 30, "rate": 30}, ValueError, "got 9 of 30 tokens for 9 queries and a window of 3, expected"),
    ({"length": 8}, ValueError, "got 9 of 8 tokens"),
    ({"window": 0}, ValueError, "window 0, expected at least 1"),
    ({"sink": torch.zeros(3)}, ValueError, "query heads is 3 in sink"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), REFUSALS)
def test_refusals(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        compressed_attention(**{**sampled(9, 9, rate=4, top=None), "window": 3, **wrong})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "dense"}, "kind is 'dense', expected 'sliding', 'csa' or 'hca'"),
    ({"heads": 3}, "got width 16 and 3 heads"),
    ({"groups": 3}, "got 4 heads in 3 groups"),
    ({"window": 0}, "'window': 0"),
    ({"kind": "sliding", "rate": 4}, "rate is 4 for a sliding layer"),
    ({"rotary": Rotary(8)}, "rotary is made for 8 of 8 channels, expected all of at most 4"),
    ({"rotary": Rotary(4, rotary_size=2)}, "rotary is made for 2 of 4 channels"),
    ({"rotary": Rotary(4, scaling=YaRN(8.0, 32))}, "rotary multiplies by 1.208, expected 1"),
]


@pytest.mark.parametrize(("wrong", "said"), CONFIGS)
def test_configurations_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        CompressedConfig(**{"width": 16, "heads": 4, **wrong})
    assert said in str(caught.value)


STATE = CompressedState(1, 9, 2, 4, rate=3, streams={"entries": 4})
TOKENS = torch.zeros(1, 1, 10, 4)
OTHERS: list[tuple[Any, type[Exception], str]] = [
    (lambda: STATE.append(TOKENS, entries_values=TOKENS, entries_gates=TOKENS), ValueError, "holds 0 of 9 tokens and"),
    (lambda: STATE.append(TOKENS), TypeError, "expected ['kv', 'entries_values', 'entries_gates']"),
    (lambda: STATE.extend(entries=TOKENS), ValueError, "expected at most 0 entries of 4 channels"),
    (lambda: STATE.crop(1), ValueError, "length is 1, expected 0 to 0"),
    (lambda: CompressedState(1, 9, 0, 4), ValueError, "window 0"),
    (lambda: compress(TOKENS, TOKENS, torch.zeros(2, 3)), ValueError, "width is 3 in bias"),
    (lambda: compress(TOKENS, TOKENS, TOKENS[0, 0], before=(TOKENS, TOKENS)), ValueError, "overlap False and a window"),
    (lambda: choose(TOKENS, TOKENS[0], TOKENS[:, 0], rate=1, top=1), ValueError, "index_heads is 10 in weights"),
    (lambda: choose(TOKENS, TOKENS[0], TOKENS[..., 0], rate=1, top=0), ValueError, "top is 0, expected at least 1"),
    (lambda: choose(TOKENS, TOKENS[0], TOKENS[..., 0], rate=0, top=1), ValueError, "rate is 0, expected at least 1"),
    (lambda: layer("hca").load({"model.q": TOKENS}), ValueError, "weights have ['model.q'], expected names of"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "said"), OTHERS)
def test_other_refusals(act: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert said in str(caught.value)
