"""What may be compared, and what is refused before anything is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnkit import registry
from attnkit.compare import rows
from attnkit.compare.options import CompareOptions
from attnkit.models.hybrids import HYBRIDS

SPEC = registry.get("softmax")


def names(*asked: str) -> list[str]:
    return [row.name for row in rows.select(asked)]


def test_every_preset_of_every_mechanism_is_a_row_and_every_installed_hybrid() -> None:
    presets = [f"{spec.name}/{preset.name}" for spec in registry.mechanisms().values() for preset in spec.presets]
    assert [row.pattern for row in rows.known() if not row.hybrid] == [(preset,) for preset in presets]
    assert [row.name for row in rows.known() if row.hybrid] == [h.name for h in HYBRIDS if h.installed]
    assert all(rows.select([row.name]) == (row,) for row in rows.known())


def test_a_row_is_named_by_preset_by_both_or_all_of_a_mechanism_at_once() -> None:
    assert names("window", "softmax/gqa", "gqa", "window") == ["window", "gqa"]
    assert names("softmax") == [preset.name for preset in SPEC.presets]
    assert names("window_5_1") == ["window_5_1"]
    assert "window_5_1" in names("hybrids")


def test_a_preset_of_two_mechanisms_needs_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"softmax": SPEC, "other": replace(SPEC, name="other", presets=SPEC.presets[:2])}
    monkeypatch.setattr(registry, "mechanisms", lambda: two)
    rows.known.cache_clear()
    try:
        assert names("other/mha", "softmax/mha", "window") == ["other/mha", "softmax/mha", "window"]
        with pytest.raises(ValueError, match="'mha' names softmax/mha and other/mha: say which"):
            names("mha")
    finally:
        rows.known.cache_clear()


def test_a_quick_run_has_eight_rows_and_a_full_one_all() -> None:
    assert tuple(row.name for row in CompareOptions(quick=True).rows) == rows.QUICK
    assert CompareOptions().rows == rows.known()
    assert [row.name for row in CompareOptions(quick=True, mechanisms=("alibi",)).rows] == ["alibi"]


@pytest.mark.parametrize("unknown", ["mhaa", "softmax/mhaa", "hardmax/mha", ""])
def test_an_unknown_row_is_refused_with_the_known_ones(unknown: str) -> None:
    with pytest.raises(ValueError, match=f"there is no row '{unknown}' to compare: name some of .*mha, mqa, gqa"):
        CompareOptions(mechanisms=("gqa", unknown))


def test_other_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="the tokenizer is 'words', expected bytes or bpe"):
        CompareOptions(tokenizer="words")
    with pytest.raises(ValueError, match="a seed is -1, expected 0 to 4294967295"):
        CompareOptions(seeds=(0, -1))
    with pytest.raises(ValueError, match="the seeds are 1, 1, expected each once"):
        CompareOptions(seeds=(1, 1))
