"""``attnkit advise`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnkit.advise.check import models

ASK = ("--hardware", "a10", "--lengths", "p50=2k,p99=6k", "--concurrency", "16")


def test_it_answers_for_a_known_model(run: Any) -> None:
    done = run("advise", "llama-3-8b", *ASK)
    assert done.code == 0, done.err
    assert "Take int4 cache (a switch, no training)" in done.out
    assert "16 requests of the worst case need 16.0 GiB of cache, and 5.9 GiB are free" in " ".join(done.out.split())


def test_json_says_the_same(run: Any) -> None:
    found = run("advise", "llama-3-8b", *ASK, "--json").json
    assert found["decision"]["chosen"] == "int4"
    assert found["model"]["token_bytes"] == 131_072
    assert {one["name"] for one in found["alternatives"]} >= {"as-is", "paged", "int8", "gqa-4", "mla", "linear-hybrid"}
    assert found["hardware"]["source"] == "NVIDIA A10 datasheet"


@pytest.mark.parametrize(
    ("option", "word"), [("--models", "llama-3-8b"), ("--families", "qwen3_next"), ("--machines", "h200")]
)
def test_what_is_known_is_listed(run: Any, option: str, word: str) -> None:
    assert word in run("advise", option).out.split()


def test_a_config_of_a_checkpoint_is_read_from_its_folder(run: Any, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"vocab_size": 99, "intermediate_size": 96, "mystery_key": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("advise", tmp_path, "--hardware", "t4", "--lengths", "1k")
    assert "mystery_key" in done.out


def test_the_limits_of_this_machine_are_hardware(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    path.write_text(run("bench", "--limits", "--threads", "1").out)
    found = run("advise", "smollm2-135m", "--hardware", path, "--lengths", "1k", "--json").json["hardware"]
    assert found["measured"] and found["source"] == "measured here by attnkit bench --limits"
    assert found["bandwidth"] > 1e8 and found["rates"]["float32"] > 1e8


def test_a_layer_is_built_and_has_the_bytes_that_were_predicted(run: Any, tmp_path: Path) -> None:
    config = {"model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99, "intermediate_size": 96, "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("advise", tmp_path, "--check", "--lengths", "p50=64,p99=256", "--dtype", "float32", "--json")
    about, *lines = [json.loads(line) for line in done.out.splitlines()]
    assert about["settings"] == {"verb": "advise --check", "tokens": 256, "prompt": 64, "threads": 1}
    assert [line["bytes_equal"] for line in lines] == [True, True]
    assert [line["allocated_bytes"] for line in lines] == [8 * 2 * 32 * 4, 256 * 2 * 32 * 4]
    assert all(line["measured_step"] > 0 and line["measured_prompt"] > 0 for line in lines)


def test_without_a_model_six_kinds_of_layers_are_checked() -> None:
    chosen = dict(models())
    assert list(chosen) == ["MHA", "GQA", "MLA", "window hybrid", "linear hybrid", "int8 cache"]
    kinds = {name: {mixer.mechanism for mixer in model.mixers} for name, model in chosen.items()}
    assert kinds["MLA"] == {"mla"} and kinds["linear hybrid"] == {"delta", "softmax"}
    assert {mixer.codec for mixer in chosen["int8 cache"].mixers} == {"int8"}
    assert {mixer.groups == mixer.heads for mixer in chosen["GQA"].mixers} == {False}
    assert len({mixer.window for mixer in chosen["window hybrid"].mixers}) == 2
