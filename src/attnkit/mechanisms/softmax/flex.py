"""FlexAttention: torch compiles one kernel for the mask and score rule of the call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    reasons = []
    q, k, v = call["q"], call["k"], call["v"]
    if call["dropout"]:
        reasons.append(f"dropout is {call['dropout']}, FlexAttention has none")
    if min(q.shape[0], q.shape[2], k.shape[2]) == 0:
        sizes = f"{q.shape[0]} sequences, {q.shape[2]} queries and {k.shape[2]} keys"
        reasons.append(f"there are {sizes}, FlexAttention needs at least 1 of each")
    if q.device.type == "cpu":
        tensors = (q, k, v, call["bias"], call["alibi"], call["sink"])
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            reasons.append("gradients are wanted, FlexAttention has no backward on a CPU")
        if call["return_lse"] or call["sink"] is not None:
            wanted = "return_lse is True" if call["return_lse"] else "sink needs the log-sum-exp"
            reasons.append(f"{wanted}, FlexAttention gives none on a CPU")
        if q.dtype == torch.float64:
            reasons.append("dtype is float64, FlexAttention's CPU kernel takes float32, bfloat16 and float16")
    return tuple(reasons)


def declines(call: Call) -> tuple[str, ...]:
    if call["q"].device.type == "cpu":
        return ("on a CPU each new mask and size compiles for 5 to 45 s: name backend='flex' to take it",)
    return ()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    dropout: float,
    seed: int | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    (b, h, m, _), n = q.shape, k.shape[2]
    score = _score_rule(m, n, bias, alibi, softcap)
    blocks = mask.flex(b, h, m, n, q.device) if mask is not None else None
    wants_lse = return_lse or sink is not None
    arguments: dict[str, Any] = dict(score_mod=score, block_mask=blocks, scale=scale, enable_gqa=h != k.shape[1])
    if wants_lse:
        arguments["return_lse"] = True
    found = _run(q, k, v, arguments)
    if not wants_lse:
        o: Tensor = found
        return o
    o, lse = found
    if sink is not None:
        # One more key of value zero: it only takes its share of the weight away.
        whole = torch.logaddexp(lse, sink[:, None].to(lse.dtype))
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - whole))
        o, lse = (o * share[..., None]).to(o.dtype), whole
    return (o, lse) if return_lse else o


def _score_rule(m: int, n: int, bias: Tensor | None, alibi: Tensor | None, softcap: float | None) -> Any:
    if bias is None and alibi is None and softcap is None:
        return None

    def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if bias is not None:
            s = s + bias[b, h, q, k]
        if alibi is not None:
            s = s - alibi[h] * (q + (n - m) - k).abs()
        return s

    return score


def _run(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Any:
    from torch.nn.attention.flex_attention import flex_attention  # slow to import, and few calls come here

    if q.device.type == "cpu":
        q, k, v = q.detach(), k.detach(), v.detach()  # it refuses what requires grad, even when none is recorded
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, **arguments)
    # Past Dynamo's recompile limit FlexAttention would run unfused, ten times slower, without a word.
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        return _compiled(flex_attention)(q, k, v, **arguments)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
