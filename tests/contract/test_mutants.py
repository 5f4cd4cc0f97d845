"""Every wrong program that somebody once shipped is noticed by some law, in float32; prints which notices it first."""

from __future__ import annotations

import pytest
import torch

from attnkit.registry import get, mechanisms
from attnkit.spec import Mechanism
from attnkit.testing import mutants
from attnkit.testing.laws import LAWS
from attnkit.testing.mutants import BACKEND, wrong_backend

# A wrong scale or a lost key hides in the rounding of half precision; mutants repeat themselves as well as the truth.
IN_FLOAT32 = [law for law in LAWS.values() if law.name not in ("definition_in_half_precision", "deterministic")]
CONTROL = 2


def killer(spec: Mechanism, examples: int | None = None) -> str | None:
    """The first law that the backend ``mutant`` breaks."""
    for law in IN_FLOAT32:
        if law.applies(spec, BACKEND):
            for seed in range(examples or law.examples):
                torch.manual_seed(seed)
                try:
                    law(spec, BACKEND, seed)
                except AssertionError:
                    return law.name
    return None


PLANTED = [(name, mutant) for name in mechanisms() for mutant in mutants.of(name)]


@pytest.mark.parametrize(("mechanism", "name"), PLANTED, ids=[f"{mechanism}-{name}" for mechanism, name in PLANTED])
def test_mutant_is_killed(mechanism: str, name: str) -> None:
    mutant = mutants.of(mechanism)[name]
    with mutant.planted(get(mechanism)) as spec:
        found = killer(spec)
    print(f"{mechanism:16} {name:24} {mutant.mistake:58} {found}")
    assert found, f"no law notices the mutant {name} of {mechanism}: {mutant.mistake}"


@pytest.mark.parametrize("mechanism", mechanisms())
def test_definition_is_not_killed(mechanism: str) -> None:
    """The control: the same machinery around the right program, which the laws of its own lane try at length."""
    spec = get(mechanism)
    with wrong_backend(spec, spec.reference) as control:
        assert killer(control, CONTROL) is None


@pytest.mark.parametrize("mechanism", mechanisms())
def test_mutants_are_planted(mechanism: str) -> None:
    assert len(mutants.of(mechanism)) >= (40 if mechanism == "softmax" else 2)
