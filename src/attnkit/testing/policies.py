"""Policies that let go of tokens, as lists of positions and loops: what any such policy's state has to agree with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnkit.masks import causal
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.state.policies import H2O, TOVA, Evicting, PyramidKV, SnapKV, StreamingLLM

B, H, G, D, E = 2, 4, 2, 4, 3


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
            newest = policy.recent or policy.budget // 2
            return {j: math.inf if j >= n - newest else self.totals[group][j] for j in among}
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


def check(policy: Evicting, chunks: list[int], seed: int) -> None:
    """Raise ``AssertionError`` unless the policy's state keeps and attends to what the rules say, append by append."""
    x = drawn(sum(chunks), seed)
    state = policy.state(B, G, 1000, D, E, dtype=torch.float64)
    oracles = [Oracle(policy, x["q"][b], x["k"][b]) for b in range(B)]
    allocated = None
    for m in chunks:
        start = state.length
        new = {name: t[:, :, start : start + m] for name, t in x.items()}
        view = state.append(**new)
        o = softmax_attention(new["q"], view.k, view.v, mask=causal(), backend="reference")
        for b, oracle in enumerate(oracles):
            seen = oracle.append(m)
            for head in range(H):
                group = head // (H // G)
                for i in range(m):
                    weights = oracle.weights(head, start + i, seen[group])
                    wanted = torch.stack([w * x["v"][b, group, j] for j, w in weights.items()]).sum(0)
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
