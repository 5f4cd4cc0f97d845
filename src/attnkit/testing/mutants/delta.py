"""Wrong programs of the delta rule: when the decay comes, what is scaled, and what a state forgets to carry."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from attnkit.convolution import ShortConvolution
from attnkit.spec import Mechanism
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _walk(call: dict[str, Any], error: str) -> tuple[Tensor, Tensor]:
    """The recurrence on its own, with the error term of one wrong program."""
    q, v, beta, decay, state = (call[name] for name in ("q", "v", "beta", "log_decay", "state"))
    k = call["k"].repeat_interleave(q.shape[1] // call["k"].shape[1], 1)
    decay = torch.zeros_like(beta) if decay is None else decay
    kept = torch.exp(decay if decay.dim() == 4 else decay[..., None])
    work, rows = torch.promote_types(q.dtype, torch.float32), []
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=work) if state is None else state.to(work)
    for t in range(q.shape[2]):
        faded = state * kept[:, :, t, :, None]
        recalled = (k[:, :, t, :, None] * (state if error == "before the decay" else faded)).sum(2)
        if error == "beta on values only":
            added = beta[:, :, t, None] * v[:, :, t] - recalled
        else:
            added = beta[:, :, t, None] * (v[:, :, t] - recalled)
        late = faded + k[:, :, t, :, None] * added[:, :, None]
        rows.append(call["read_scale"] * (q[:, :, t, :, None] * (faded if error == "read first" else late)).sum(2))
        state = late
    return torch.stack(rows, 2).to(q.dtype), state


def _with(error: str) -> Any:
    return lambda spec: lambda **call: _walk(call, error)


def _first_of_group(call: dict[str, Any]) -> dict[str, Any]:
    h, g = call["q"].shape[1], call["k"].shape[1]
    return {"k": call["k"].repeat(1, h // g, 1, 1)}


def _restarts(spec: Mechanism) -> Any:
    def wrong(**call: Any) -> Any:
        return spec.reference(**{**call, "state": None})

    return wrong


def _no_tail(right: Any) -> Any:
    def forward(self: ShortConvolution, x: Tensor, tail: Tensor | None = None, *given: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = right(self, x, None, *given)
        return found

    return forward


def _activated_tail(right: Any) -> Any:
    def forward(self: ShortConvolution, *given: Any) -> tuple[Tensor, Tensor]:
        y, tail = right(self, *given)
        return y, silu(tail)

    return forward


MUTANTS.running("error_before_decay", "the error is taken from the state before it decays", _with("before the decay"))
MUTANTS.running("beta_on_values_only", "beta does not weigh what is unlearned", _with("beta on values only"))
MUTANTS.running("read_before_write", "a token does not read what it wrote", _with("read first"))
MUTANTS.running("state_restarts", "the state handed in is forgotten", _restarts)
MUTANTS.calling("heads_in_turn", "key heads serve every g-th head and not neighbours", _first_of_group)
MUTANTS.calling(
    "decay_base_2",
    "logarithms in base 2",
    lambda call: {} if call["log_decay"] is None else {"log_decay": call["log_decay"] * math.log2(math.e)},
)
MUTANTS.calling(
    "keys_scaled", "the scale multiplies the keys as well", lambda call: {"k": call["k"] * call["read_scale"]}
)
MUTANTS.replacing("tail_dropped", "each step starts the convolution from zeros", ShortConvolution, "forward", _no_tail)
MUTANTS.replacing(
    "activated_tail", "the convolution's rows are kept activated", ShortConvolution, "forward", _activated_tail
)
