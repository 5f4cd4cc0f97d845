"""The calls of a case: arguments drawn for it, and for each way of doing the work a function without arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attnkit.bench import states
from attnkit.bench.sizes import Case, Way
from attnkit.masks import padding
from attnkit.registry import get
from attnkit.spec import Mechanism, Sizes
from attnkit.testing.runs import results, tensors

Call = Callable[[], Any]
Arguments = dict[str, Any]
SHORTEST = 16
"""The longest of ragged sequences is so many times as long as the shortest."""


@dataclass(frozen=True)
class Work:
    """Ours and the peer's call, the operations or bytes that ours cannot do without, and what ours was given."""

    ours: Call
    peer: Call | None
    amount: float
    given: Arguments


def work(case: Case) -> Work:
    """The calls of a case. Raises ``NotImplementedError`` with the reasons where ours or the peer's is refused."""
    given = arguments(case)
    if case.ours.state is not None:
        held = states.filled(case.ours.state, given["k"], given["v"])
        mine, moved = states.step(given["q"], held), float(held.nbytes)
    else:
        mine, moved = call(case, case.ours, given), amount(case)
    return Work(mine, None if case.peer is None else call(case, case.peer, given), moved, given)


def ours(case: Case) -> Call:
    """Our call alone."""
    return work(replace(case, peer=None)).ours


def amount(case: Case) -> float:
    """The operations or the bytes of a case, whichever its limit is of."""
    cost = case.cost()
    if case.limit != "read":
        return cost.flops * case.flops_factor
    return cost.bytes * (lengths(case.sizes).double().mean().item() / case.sizes.n if case.inputs == "ragged" else 1.0)


def call(case: Case, way: Way, given: Arguments) -> Call:
    """The call of ``given`` arguments as ``way`` has them; refused calls raise here and not only when they run."""
    spec = get(way.mechanism) if way.mechanism else case.spec
    if way.mechanism:
        # Latent keys are expanded for every head where something else attends to them.
        sizes = replace(case.sizes, g=case.sizes.h) if case.inputs == "indexed" else case.sizes
        given = dict(_drawn(way.mechanism, case.seed, sizes, getattr(torch, case.dtype)))
    if way.dtype:
        given = given | {name: x.to(getattr(torch, way.dtype)) for name, x in tensors(given).items()}
    if way.mask or way.mechanism:
        given = given | {"mask": case.visible(way.mask or case.mask)}
    if case.backward:
        given = given | {name: given[name].clone().requires_grad_() for name in leaves(given)}
    refuse(spec, way.backend, given)
    forward = partial(spec.function, **given, backend=way.backend)
    return partial(_trained, forward, [given[name] for name in leaves(given)]) if case.backward else forward


def refuse(spec: Mechanism, backend: str, given: Arguments) -> None:
    """Raise ``NotImplementedError`` with the reasons when the backend does not run this call."""
    if all(known.name != backend for known in spec.backends):
        raise NotImplementedError(f"{spec.name} has no backend {backend!r}")
    reasons = spec.backend(backend).rejects(spec.call(**given))
    if reasons:
        raise NotImplementedError("; ".join(reasons))


def leaves(given: Arguments) -> list[str]:
    """What training asks a gradient of: the tensors of tokens, not fixed decays and not a state handed in."""
    return [name for name, x in tensors(given).items() if x.dim() >= 3 and name != "state"]


def _trained(forward: Call, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    o = results(forward())[0]
    return torch.autograd.grad(o, wanted, torch.ones_like(o), allow_unused=True)


def arguments(case: Case, sizes: Sizes | None = None) -> Arguments:
    """Arguments for the mechanism's function, at the case's sizes with its options, or smaller ones for a check.

    A sample scales a mechanism's own options, such as the size of a block, to the length that it is asked for.
    """
    at = case if sizes is None else case.at(sizes)
    dtype = getattr(torch, case.dtype)
    drawn = INPUTS[case.inputs](at, dtype)
    if case.inputs == "sample":
        if "mask" in drawn:
            drawn["mask"] = at.visible(case.mask)
        if sizes is None:
            drawn = drawn | dict(case.options)
    return drawn


def lengths(sizes: Sizes) -> Tensor:
    """Lengths of ragged sequences, evenly spread from a sixteenth of the longest on: int64 (b,)."""
    return torch.linspace(sizes.n // SHORTEST, sizes.n, sizes.b).long()


def _sample(case: Case, dtype: torch.dtype) -> Arguments:
    return dict(_drawn(case.mechanism, case.seed, case.sizes, dtype))


@lru_cache(maxsize=1)  # cases of the same sizes follow one another, and drawing a long cache takes seconds
def _drawn(mechanism: str, seed: int, sizes: Sizes, dtype: torch.dtype) -> Arguments:
    """A sample whose sequences are copies of one: the same bytes to move, drawn in a fraction of the time."""
    one = get(mechanism).sample(seed, replace(sizes, b=1), dtype)
    copied = {name: x.repeat(sizes.b, *[1] * (x.dim() - 1)) for name, x in tensors(one).items() if x.shape[0] == 1}
    return one | copied


def _ragged(case: Case, dtype: torch.dtype) -> Arguments:
    """Sequences of several lengths, behind which the keys are padding."""
    keep = torch.arange(case.sizes.n) < lengths(case.sizes)[:, None]
    return _sample(case, dtype) | {"mask": padding(keep)}


def _latent(case: Case, dtype: torch.dtype) -> Arguments:
    s, options = case.sizes, dict(case.options)
    c, rotary = options["latent"], options["rotary"]
    generator = torch.Generator().manual_seed(case.seed)
    q, latent, kv_b = (
        torch.randn(shape, generator=generator)
        for shape in ((s.b, s.h, s.m, s.d), (s.b, s.g, s.n, c + rotary), (s.h, s.d - rotary + s.e, c))
    )
    mask = {"mask": case.visible(case.mask)} if case.mechanism == "mla" else {}
    return {"q": q.to(dtype), "latent": latent.to(dtype), "kv_b": (kv_b * c**-0.5).to(dtype)} | mask


def _indexed(case: Case, dtype: torch.dtype) -> Arguments:
    s, options = case.sizes, dict(case.options)
    heads, size = options["index_heads"], options["index"]
    generator = torch.Generator().manual_seed(case.seed + 1)
    index_q, index_k, index_w = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((s.b, heads, s.m, size), (s.b, 1, s.n, size), (s.b, heads, s.m))
    )
    drawn = {"index_q": index_q, "index_k": index_k, "index_w": index_w + 0.5, "top": min(options["top"], s.n // 3)}
    return _latent(case, dtype) | drawn


INPUTS: dict[str, Callable[[Case, torch.dtype], Arguments]] = {
    "sample": _sample,
    "ragged": _ragged,
    "latent": _latent,
    "indexed": _indexed,
}
