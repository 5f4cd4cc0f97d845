"""The command: what it prints, its exit codes, and its sentences."""

from __future__ import annotations

import json

import pytest

from attnkit.cli import main


def test_a_clean_model_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "llama", "--backends", "attnkit,eager", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["against"] == "eager"
    verdicts = {(row["check"], row["backend"], row["cache"]): row["verdict"] for row in report["rows"]}
    assert verdicts["layers", "eager", None] == "same"
    assert verdicts["decode", "attnkit", "attnkit"] == "within rounding"


def test_an_unknown_family_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "lama"]) == 2
    assert "perhaps 'llama'" in capsys.readouterr().err
