"""Policies against lists and loops written from the papers; a budget that covers all changes no bit; budgets hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnkit
from attnkit.positions import Rotary
from attnkit.state import KVState
from attnkit.state.policies import (
    H2O,
    TOVA,
    AShape,
    BlockSparse,
    Evicting,
    PerHead,
    Policy,
    PyramidKV,
    Quest,
    SnapKV,
    StreamingLLM,
    VerticalSlash,
    XAttention,
)

B, H, G, D, E = 2, 4, 2, 4, 3
CHUNKS = st.lists(st.sampled_from([1, 1, 1, 2, 5, 13]), min_size=1, max_size=14)


def drawn(n: int, seed: int = 0, dtype: torch.dtype = torch.float64, d: int = D, e: int = E) -> dict[str, Tensor]:
    """Queries, keys and values of ``n`` tokens; keys large enough that weights differ."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, H, n, d), "k": (B, G, n, d), "v": (B, G, n, e)}
    return {name: (2 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


class Oracle:
    """One sequence as lists of positions, a list a KV head, and the papers' rules in loops."""

    def __init__(self, policy: Evicting, q: Tensor, k: Tensor) -> None:
        self.policy, self.q, self.k = policy, q.tolist(), k.tolist()
        self.held: list[list[int]] = [[] for _ in range(G)]
        self.totals: list[dict[int, float]] = [{} for _ in range(G)]
        self.length = 0

    def weights(self, head: int, i: int, among: list[int]) -> dict[int, float]:
        """Softmax weights that query ``i`` gives to the positions ``among`` up to its own."""
        keys = self.k[head // (H // G)]
        logits = {
            j: sum(a * b for a, b in zip(self.q[head][i], keys[j], strict=True)) / math.sqrt(D) for j in among if j <= i
        }
        most = max(logits.values())
        total = sum(math.exp(x - most) for x in logits.values())
        return {j: math.exp(x - most) / total for j, x in logits.items()}

    def heads(self, group: int) -> range:
        return range(group * H // G, (group + 1) * H // G)

    def append(self, m: int) -> list[list[int]]:
        """Take ``m`` tokens; the positions that they see, a list a KV head."""
        new = list(range(self.length, self.length + m))
        seen = [[*held, *new] for held in self.held]
        self.length += m
        if isinstance(self.policy, H2O):
            for group, among in enumerate(seen):
                for i in new:
                    for head in self.heads(group):
                        for j, weight in self.weights(head, i, among).items():
                            self.totals[group][j] = self.totals[group].get(j, 0) + weight / (H // G)
        self.held = seen
        if len(seen[0]) > self.policy.budget:
            count = self.policy.budget if m > 1 else self.policy.budget - self.policy.every + 1
            self.held = []
            for group, among in enumerate(seen):
                score = self.scores(group, among)
                best = sorted(among, key=lambda j: (score[j], j), reverse=True)[:count]
                self.held.append(sorted(best))
        return seen

    def scores(self, group: int, among: list[int]) -> dict[int, float]:
        policy, n = self.policy, self.length
        if isinstance(policy, StreamingLLM):
            return {j: math.inf if j < policy.sinks else j for j in among}
        if isinstance(policy, H2O):
            return {j: math.inf if j >= n - policy.newest else self.totals[group][j] for j in among}
        if isinstance(policy, TOVA):
            of_heads = [self.weights(head, n - 1, among) for head in range(H)]
            return {j: math.inf if j == n - 1 else sum(w[j] for w in of_heads) / H for j in among}
        assert isinstance(policy, SnapKV)
        window = list(range(n - policy.observed, n))
        before = [j for j in among if j not in window]
        score = dict.fromkeys(before, 0.0)
        for head in self.heads(group):
            rows = [self.weights(head, i, among) for i in window]
            mean = [sum(row[j] for row in rows) / len(rows) for j in before]
            for at, j in enumerate(before):
                half = policy.kernel // 2
                near = [mean[i] for i in range(at - half, at + half + 1) if 0 <= i < len(before)]
                score[j] += (max(near) if policy.pool == "max" else sum(near) / policy.kernel) / (H // G)
        return score | dict.fromkeys(window, math.inf)


EVICTING: dict[str, Evicting] = {
    "streaming": StreamingLLM(7, sinks=2),
    "streaming without sinks": StreamingLLM(5, sinks=0),
    "h2o": H2O(8),
    "h2o recent 2": H2O(6, recent=2),
    "h2o by threes": H2O(9, every=3),
    "tova": TOVA(6),
    "tova by twos": TOVA(7, every=2),
    "snapkv": SnapKV(9, observed=3, kernel=3, every=1),
    "snapkv max": SnapKV(12, observed=2, kernel=5, every=4, pool="max"),
    "pyramidkv": PyramidKV(12, observed=4, kernel=3, every=2, beta=4).for_layer(1, 3),
}


def run_against_oracle(policy: Evicting, chunks: list[int], seed: int) -> None:
    x = drawn(sum(chunks), seed)
    state = policy.state(B, G, 1000, D, E, dtype=torch.float64)
    oracles = [Oracle(policy, x["q"][b], x["k"][b]) for b in range(B)]
    allocated = None
    for m in chunks:
        start = state.length
        new = {name: t[:, :, start : start + m] for name, t in x.items()}
        view = state.append(**new)
        o = attnkit.softmax_attention(new["q"], view.k, view.v, mask=attnkit.causal(), backend="reference")
        for b, oracle in enumerate(oracles):
            seen = oracle.append(m)
            for head in range(H):
                group = head // (H // G)
                for i in range(m):
                    weights = oracle.weights(head, start + i, seen[group])
                    wanted = sum(w * x["v"][b, group, j] for j, w in weights.items())
                    assert torch.allclose(o[b, head, i], wanted, rtol=1e-9, atol=1e-11), "not the attention of the kept"
            for group in range(G):
                positions = state.positions[b, group]
                assert positions.sort().values.tolist() == oracle.held[group]
                assert torch.equal(state.view().k[b, group], x["k"][b, group, positions])
                assert torch.equal(state.view().v[b, group], x["v"][b, group, positions])
        state.check()
        assert state.held <= policy.budget
        allocated = allocated or state.nbytes
        if start >= policy.window:
            assert state.nbytes <= allocated + 8 * B * H * policy.window * D


@pytest.mark.parametrize("name", EVICTING)
def test_what_is_kept_is_what_the_paper_says(name: str, full: bool) -> None:
    @settings(max_examples=300 if full else 12, derandomize=True, deadline=None)
    @given(chunks=CHUNKS, seed=st.integers(0, 999))
    def check(chunks: list[int], seed: int) -> None:
        run_against_oracle(EVICTING[name], chunks, seed)

    check()


WHOLE: dict[str, Policy] = {
    "quest": Quest(48, page=4),
    "a shape": AShape(4, 60),
    "vertical slash": VerticalSlash(64, 64, last=8, forced=2),
    "block sparse": BlockSparse(8, block=8),
    "xattention": XAttention(1.0, stride=4, block=8),
    "a mask a head": PerHead([AShape(4, 60), VerticalSlash(64, 64)] * 2),
}
COVERING: dict[str, Policy] = {
    "streaming": StreamingLLM(48, sinks=4),
    "streaming, positions of the cache": StreamingLLM(48, sinks=4, rotary=Rotary(D)),
    "h2o": H2O(48),
    "tova": TOVA(48),
    "snapkv": SnapKV(48, observed=8),
    "pyramidkv": PyramidKV(60, observed=8, beta=2).for_layer(0, 2),
    **WHOLE,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COVERING)
def test_a_budget_that_covers_all_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    for chunks in ([48], [40, *[1] * 8], [1] * 20, [5, 1, 17, 1, 1, 20, 3]):
        x = drawn(sum(chunks), 3, dtype)
        state, plain = COVERING[name].state(B, G, 64, D, E, dtype=dtype), KVState(B, G, 64, D, E, dtype=dtype)
        for m in chunks:
            new = {key: t[:, :, state.length : state.length + m] for key, t in x.items()}
            view, mask = state.append(**new).for_queries(attnkit.causal(), m)
            whole_view = plain.append(new["k"], new["v"])
            found = attnkit.softmax_attention(new["q"], view.k, view.v, mask=mask)
            assert found.equal(attnkit.softmax_attention(new["q"], whole_view.k, whole_view.v, mask=attnkit.causal()))


class QuestOracle:
    """Pages as lists."""

    @staticmethod
    def tokens(policy: Quest, q: Tensor, k: Tensor) -> list[int]:
        """Tokens that one KV head reads: ``q`` (r, d) of its heads, ``k`` (n, d)."""
        n, page = len(k), policy.page
        pages = [list(range(i, min(i + page, n))) for i in range(0, n, page)]

        def bound(tokens: list[int]) -> float:
            keys = [k[j].tolist() for j in tokens]
            low, high = [min(c) for c in zip(*keys, strict=True)], [max(c) for c in zip(*keys, strict=True)]
            heads = [sum(max(x * a, x * b) for x, a, b in zip(row, low, high, strict=True)) for row in q.tolist()]
            for row, most in zip(q, heads, strict=True):
                assert all(float(row @ k[j]) <= most + 1e-12 for j in tokens), "not a bound"
            return max(heads)

        count = policy.budget // page
        best = sorted(pages[:-1], key=bound, reverse=True)[: count - 1] if len(pages) > count else pages[:-1]
        return sorted(j for tokens in [*best, pages[-1]] for j in tokens)


@pytest.mark.parametrize("policy", [Quest(12, page=4), Quest(10, page=3), Quest(5, page=1)], ids=str)
def test_quest_reads_the_pages_with_the_highest_bounds(policy: Quest) -> None:
    x = drawn(41, 5)
    state, n = policy.state(B, G, 60, D, E, dtype=torch.float64), 0
    for m in [9, *[1] * 12, 5, *[1] * 15]:
        new = {key: t[:, :, n : n + m] for key, t in x.items()}
        view = state.append(**new)
        n += m
        state.check()
        if m > 1:
            assert view.k.equal(x["k"][:, :, :n])
            continue
        assert view.k.shape[2] <= policy.budget
        for b in range(B):
            for g in range(G):
                tokens = QuestOracle.tokens(policy, x["q"][b, g * 2 : g * 2 + 2, n - 1], x["k"][b, g, :n])
                assert view.k[b, g].equal(x["k"][b, g, tokens])
                assert view.v[b, g].equal(x["v"][b, g, tokens])
    state.crop(21)
    state.check()
    assert state.fork().append(**{key: t[:, :, 21:22] for key, t in x.items()}).k.shape[2] <= policy.budget


def loops(policy: Any, q: Tensor, k: Tensor) -> list[list[set[int]]]:
    """What each head's query sees: ``q`` (h, m, d), ``k`` (g, n, d); from the papers' algorithms, in loops."""
    (h, m, d), (g, n, _) = q.shape, k.shape
    result = []
    for head in range(h):
        keys = k[head // (h // g)]

        def logit(i: int, j: int, keys: Tensor = keys, head: int = head) -> float:
            return float(q[head, i - (n - m)] @ keys[j]) / math.sqrt(d)

        queries = range(n - m, n)
        if isinstance(policy, AShape):
            seen = [{j for j in range(i + 1) if j < policy.sinks or i - j < policy.local} for i in queries]
        elif isinstance(policy, VerticalSlash):
            columns, diagonals = [0.0] * n, [0.0] * n
            for i in queries[-policy.last :]:
                total = sum(math.exp(logit(i, j)) for j in range(i + 1))
                for j in range(i + 1):
                    columns[j] += math.exp(logit(i, j)) / total
                    diagonals[i - j] += math.exp(logit(i, j)) / total
            for line in (columns, diagonals):
                line[: policy.forced] = [math.inf] * policy.forced
            best = [
                set(sorted(range(n), key=lambda j: -line[j])[:count])
                for line, count in ((columns, policy.vertical), (diagonals, policy.slash))
            ]
            seen = [{j for j in range(i + 1) if j in best[0] or i - j in best[1]} for i in queries]
        else:
            blocks = chosen_blocks(policy, q[head], keys)
            seen = [{j for j in range(i + 1) if j // policy.block in blocks[i // policy.block]} for i in queries]
        result.append(seen)
    return result


def chosen_blocks(policy: Any, q: Tensor, k: Tensor) -> dict[int, set[int]]:
    """Key blocks of each query block, for ``q`` (m, d), the last, and ``k`` (n, d) of one head."""
    (m, d), n, size = q.shape, len(k), policy.block
    start = n - m
    result = {}
    for row in range(start // size, (n - 1) // size + 1):
        rows = [i for i in range(row * size, (row + 1) * size) if start <= i < n]
        score = {}
        if isinstance(policy, BlockSparse):
            for block in range(row + 1):
                mean = k[block * size : (block + 1) * size].mean(0)
                score[block] = float(q[[i - start for i in rows]].mean(0) @ mean) / math.sqrt(d)
            result[row] = set(sorted(score, key=lambda b: -score[b])[: policy.blocks])
            continue
        s = policy.stride
        score = dict.fromkeys(range(row + 1), 0.0)
        for tile in range(row * size // s, (row + 1) * size // s):
            if not any(start <= i < n for i in range(tile * s, (tile + 1) * s)):
                continue
            logits = []
            for other in range(tile + 1):
                pairs = [(tile * s + s - 1 - i, other * s + i) for i in range(s)]
                inside = [(i, j) for i, j in pairs if start <= i < n and j < n]
                logits.append(sum(float(q[i - start] @ k[j]) for i, j in inside) / math.sqrt(d) / s)
            total = sum(math.exp(x) for x in logits)
            for other, x in enumerate(logits):
                score[other * s // size] += math.exp(x) / total
        chosen, mass, total = {row} | ({0} if policy.sink else set()), 0.0, sum(score.values())
        for block in sorted(score, key=lambda b: -score[b]):
            if mass < policy.threshold * total:
                chosen.add(block)
            mass += score[block]
        result[row] = chosen
    return result


PREFILL: dict[str, Any] = {
    "a shape": AShape(3, 5),
    "a shape without sinks": AShape(0, 4),
    "vertical slash": VerticalSlash(6, 7, last=5, forced=2),
    "block sparse": BlockSparse(2, block=8),
    "xattention": XAttention(0.6, stride=4, block=8),
    "xattention without sink": XAttention(0.8, stride=2, block=4, sink=False),
}


@pytest.mark.parametrize("name", PREFILL)
def test_a_prompt_sees_what_the_paper_says(name: str) -> None:
    policy = PREFILL[name]
    for n, m in ((33, 33), (40, 40), (37, 12), (50, 2), (7, 7)):
        x = drawn(n, n)
        state = policy.state(B, G, n, D, E, dtype=torch.float64)
        if n > m:
            state.append(**{key: t[:, :, : n - m] for key, t in x.items()})
        new = {key: t[:, :, n - m :] for key, t in x.items()}
        view, mask = state.append(**new).for_queries(attnkit.causal(), m)
        found = mask.dense(m, n).expand(B, H, m, n)
        for b in range(B):
            for head, rows in enumerate(loops(policy, new["q"][b], x["k"][b])):
                assert [set(row.nonzero()[:, 0].tolist()) for row in found[b, head]] == rows
        o = attnkit.softmax_attention(new["q"].float(), view.k.float(), view.v.float(), mask=mask)
        wanted = attnkit.softmax_attention(new["q"], view.k, view.v, mask=found.contiguous(), backend="reference")
        assert torch.allclose(o.double(), wanted, atol=1e-5)
        one = state.append(**{key: t[:, :, :1] for key, t in x.items()}) if n < state.capacity else None
        assert one is None or one.mask is None


def test_every_head_may_have_a_policy_of_its_own() -> None:
    policies = [AShape(3, 5), VerticalSlash(6, 7, last=5, forced=2), BlockSparse(2, block=8), AShape(0, 99)]
    x = drawn(40, 1)
    mask = PerHead(policies).mask(x["q"], x["k"], D**-0.5)
    assert mask is not None
    found = (mask & attnkit.causal()).dense(40, 40)
    for b in range(B):
        for head, policy in enumerate(policies):
            rows = loops(policy, x["q"][b, head : head + 1], x["k"][b, head // 2 : head // 2 + 1])[0]
            assert [set(row.nonzero()[:, 0].tolist()) for row in found[b, head]] == rows
    o = attnkit.softmax_attention(x["q"].float(), x["k"].float(), x["v"].float(), mask=mask & attnkit.causal())
    wanted = attnkit.softmax_attention(x["q"], x["k"], x["v"], mask=found, backend="reference")
    assert torch.allclose(o.double(), wanted, atol=1e-5)
