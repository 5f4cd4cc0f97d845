"""Whether our result is right: a wrong result has no speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnkit.bench import calls, states
from attnkit.bench.sizes import Case
from attnkit.spec import Sizes
from attnkit.testing.runs import (
    assert_gradients_match,
    assert_matches,
    assert_results_within,
    gold,
    naive,
    results,
)

# Lengths of the check: no block size divides them, so that it meets ragged edges, and decoding splits its keys.
PREFILL, DECODE = 201, 4099
ROWS = 8
"""The last queries of a long call that are compared with the definition, which could not hold all of them."""


def check(case: Case) -> str | None:
    """What is wrong with our result on a small call of the same kind, judged as the tests do; None when nothing is.

    In float32 first: the rounding of half precision hides a mistake as large as a scale that is 1 % off.
    """
    try:
        if case.ours.state is not None:
            _check_state(case, _small(case))
            return None
        for dtype in dict.fromkeys(("float32", case.dtype)):
            given = calls.arguments(replace(case, dtype=dtype), _small(case))
            if dtype != case.dtype and case.spec.backend(case.ours.backend).rejects(case.spec.call(**given)):
                continue
            assert_matches(case.spec, case.ours.backend, given)
            if case.backward:
                assert_gradients_match(case.spec, case.ours.backend, given)
    except AssertionError as error:
        return str(error)
    return None


def check_rows(case: Case, given: calls.Arguments, found: Any) -> str | None:
    """The same for the last rows of the call that is timed, where its queries are the last of its keys."""
    if case.backward or case.ours.state is not None or not (case.sizes.m > ROWS and case.long):
        return None
    m = case.sizes.m
    last = {name: _last(x, m) for name, x in given.items() if isinstance(x, Tensor) and name in QUERIES}
    try:
        got = tuple(x[:, :, -ROWS:].clone() for x in results(found))
        few = given | last
        dtype = getattr(torch, case.dtype)
        assert_results_within(got, gold(case.spec, few), naive(case.spec, few), dtype)
    except AssertionError as error:
        return f"in the last {ROWS} rows, {error}"
    return None


QUERIES = ("q", "gates", "index_q", "index_w")
"""The arguments that have a row for every query."""


def _last(x: Tensor, m: int) -> Tensor:
    assert x.shape[2] == m, f"an argument has {x.shape[2]} rows, expected {m}"
    return x[:, :, -ROWS:].clone()


def _small(case: Case) -> Sizes:
    s = case.sizes
    n = DECODE if case.decodes else PREFILL
    g = min(s.g, 2)
    return replace(s, b=min(s.b, 2), h=g * min(s.h // s.g, 16), g=g, m=1 if case.decodes else n, n=n)


def _check_state(case: Case, sizes: Sizes) -> None:
    """A step over a state against the definition on the keys and values that the state says it holds."""
    assert case.ours.state is not None
    given = calls.arguments(case, sizes)
    filled = states.filled(case.ours.state, given["k"], given["v"])
    found = states.step(given["q"], filled)()
    k, v = states.held(filled)
    dtype = getattr(torch, case.dtype)
    exact = given | {"q": given["q"].float(), "k": k.float(), "v": v.float()}
    plain = given | {"k": k.to(dtype, copy=True), "v": v.to(dtype, copy=True)}
    assert_results_within(results(found), gold(case.spec, exact), naive(case.spec, plain), dtype)
