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
    PerHead,
    Policy,
    PyramidKV,
    Quest,
    SnapKV,
    StreamingLLM,
    VerticalSlash,
    XAttention,
)
from attnkit.testing import policies as oracle
from attnkit.testing.budgets import assert_within
from attnkit.testing.policies import EVICTING, B, D, E, G, H, drawn

CHUNKS = st.lists(st.sampled_from([1, 1, 1, 2, 5, 13]), min_size=1, max_size=14)


@pytest.mark.parametrize("name", EVICTING)
def test_what_is_kept_is_what_the_paper_says(name: str, full: bool) -> None:
    @settings(max_examples=300 if full else 12, derandomize=True, deadline=None)
    @given(chunks=CHUNKS, seed=st.integers(0, 999))
    def check(chunks: list[int], seed: int) -> None:
        oracle.check(EVICTING[name], chunks, seed)

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


def assert_sees(q: Tensor, k: Tensor, v: Tensor, mask: attnkit.Mask, table: Tensor) -> None:
    """Attention in float32 under ``mask`` is the definition's under the table of pairs that it stands for."""
    short = (q.float(), k.float(), v.float())
    gold = attnkit.softmax_attention(q, k, v, mask=table, backend="reference")
    naive = attnkit.softmax_attention(*short, mask=table, backend="reference")
    assert_within(attnkit.softmax_attention(*short, mask=mask), gold, naive, torch.float32)


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
        assert_sees(new["q"], view.k, view.v, mask, found.contiguous())
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
    assert_sees(x["q"], x["k"], x["v"], mask & attnkit.causal(), found)
