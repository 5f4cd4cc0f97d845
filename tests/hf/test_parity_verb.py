"""The command: what it prints, its exit codes, its report, and its sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AttentionInterface, AttentionMaskInterface

from attnkit.cli import main
from attnkit.hf import masks
from attnkit.hf.attention import attention
from attnkit.parity.families import build


def test_a_clean_model_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "llama", "--backends", "attnkit,eager", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["against"] == "eager" and report["backends"] == ["attnkit", "eager"]
    verdicts = {(row["check"], row["backend"], row["cache"]): row["verdict"] for row in report["rows"]}
    assert verdicts["layers", "eager", None] == "same"
    assert verdicts["decode", "attnkit", "attnkit"] == "within rounding"
    assert len({check for check, _, _ in verdicts}) == 15  # what docs/parity.md says


def test_a_changed_folder_exits_with_1_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tiled(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        k, v = (x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v))
        return attention(module, q, k, v, mask, **kwargs)

    build("llama", num_hidden_layers=2).save_pretrained(tmp_path / "mine")
    page = tmp_path / "report.html"
    AttentionInterface.register("tiled", tiled)
    AttentionMaskInterface.register("tiled", masks.attention_mask)
    try:
        code = main(["parity", str(tmp_path / "mine"), "--backends", "tiled,attnkit", "--html", str(page)])
    finally:
        del AttentionInterface._global_mapping["tiled"], AttentionMaskInterface._global_mapping["tiled"]
    assert code == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "tiled, attention: CHANGED from model.layers.0.self_attn on" in out
    assert "KV heads are tiled where each has to be repeated" in out
    text = page.read_text(encoding="utf-8")
    assert "checks found a change" in text and "KV heads are tiled" in text
    assert "http" not in text.replace("http-equiv", "")  # it works offline


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lama"], "perhaps 'llama'"),
        (["llama", "--caches", "int5"], "there is no cache 'int5'"),
        (["llama", "--backends", "sdap"], "perhaps 'sdpa'"),
        (["llama", "--against", "flash"], "there is no attention implementation 'flash'"),
        (["llama", "--backends", ""], "nothing to check"),
        (["llama", "--text", "README.md"], "no tokenizer"),
        (["llama", "--dtype", "int8"], "float32"),
        ([__file__], "expected the folder of a model"),
    ],
)
def test_a_users_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["parity", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
