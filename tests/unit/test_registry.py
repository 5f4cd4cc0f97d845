"""The registry: folders, entry points of other packages, names that do not exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from attnkit import registry
from attnkit.registry import get, mechanisms


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    mechanisms.cache_clear()
    yield
    mechanisms.cache_clear()


def entries(monkeypatch: pytest.MonkeyPatch, **named: Any) -> None:
    offered = [SimpleNamespace(name=name, load=lambda value=value: value) for name, value in named.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: offered)


def test_every_folder_is_found_under_its_name() -> None:
    assert "softmax" in mechanisms()
    assert all(name == spec.name for name, spec in mechanisms().items())


def test_records_are_complete() -> None:
    for spec in mechanisms().values():
        assert spec.title and spec.equation and spec.papers
        assert spec.presets or not spec.laws.causal, "a mechanism that can mix a decoder's tokens has a row to compare"
        assert len({b.name for b in spec.backends}) == len(spec.backends)
        assert len({p.name for p in spec.presets}) == len(spec.presets)
        assert not {p.name for p in spec.presets} & set(mechanisms()), "a mechanism's name stands for all its rows"


def test_unknown_names_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="there is no mechanism 'retentoin': name one of .*softmax"):
        get("retentoin")
    with pytest.raises(ValueError, match="softmax has no preset 'gqqa': name one of mha, mqa, gqa"):
        get("softmax").preset("gqqa")


def test_another_package_adds_a_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, mine=dataclasses.replace(get("softmax"), name="mine"))
    mechanisms.cache_clear()
    assert get("mine").name == "mine"


def test_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, softmax=get("softmax"))
    mechanisms.cache_clear()
    with pytest.raises(RuntimeError, match="two mechanisms are named 'softmax'"):
        mechanisms()


def test_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, mine="not a record")
    with pytest.raises(RuntimeError, match="'mine' holds a str, expected a Mechanism of that name"):
        mechanisms()
