"""What ``attnkit advise`` says of input that is no good: one sentence that names file and field, and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 99,
    "max_position_embeddings": 4096,
}
ASK = ("--hardware", "t4", "--lengths", "1k")

LIES: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0, expected 1 to 65,536"),
    "2^31 heads": ({"num_attention_heads": 1 << 31}, "num_attention_heads is 2147483648, expected"),
    "negative layers": ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected"),
    "a million layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected 1 to 4,096"),
    "text for a number": ({"hidden_size": "64"}, 'hidden_size is "64", expected a whole number'),
    "a fraction": ({"hidden_size": 64.5}, "hidden_size is 64.5, expected a whole number"),
    "true for a number": ({"vocab_size": True}, "vocab_size is true, expected a whole number"),
    "a list for a number": ({"vocab_size": [1]}, "vocab_size is [1], expected a whole number"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of the 4"),
    "more KV heads than heads": ({"num_key_value_heads": 8}, "num_key_value_heads is 8, expected a divisor"),
    "nothing": ({"hidden_size": None}, "hidden_size is missing, expected a whole number"),
    "unknown family": ({"model_type": "frobnicator"}, "model_type is 'frobnicator', expected a family"),
    "no family": ({"model_type": None}, "model_type is missing, expected the name of a family"),
    "family is a number": ({"model_type": 7}, "model_type is 7, expected text"),
    "unknown layer": ({"layer_types": ["full_attention", "magic"]}, "layer_types has 'magic', expected one of"),
    "too few layer types": ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected 2, one a layer"),
    "window without size": (
        {"layer_types": ["sliding_attention"] * 2},
        "sliding_window is missing, expected the window",
    ),
    "unknown dtype": ({"torch_dtype": "float3"}, "dtype is 'float3', expected one of"),
    "unknown quantisation": (
        {"quantization_config": {"quant_method": "magic"}},
        "quantization_config.quant_method is 'magic', expected one of",
    ),
    "code of the checkpoint": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}},
        "auto_map wants code from the checkpoint for model_type 'mine', expected a family that attnkit knows",
    ),
}


def written(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize("name", LIES)
def test_a_config_that_lies_is_named(run: Any, tmp_path: Path, name: str) -> None:
    changes, expected = LIES[name]
    path = written(tmp_path, GOOD | changes)
    error = run("advise", path, *ASK).error
    assert error.startswith(f"{path}: ") and expected in error


TEXTS = {
    "{": "is no JSON at line 1",
    "": "is no JSON at line 1",
    "[1, 2]": "holds [1, 2], expected an object",
    "[" * 100_000: "is nested too deeply",
    "\x00\xff": "is no",
}


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_object_is_refused(run: Any, tmp_path: Path, text: str) -> None:
    path = written(tmp_path, "")
    path.write_bytes(text.encode("latin-1"))
    error = run("advise", path, *ASK).error
    assert str(path) in error and TEXTS[text] in error


def test_a_huge_file_is_not_read(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert "has 1,073,741,824 bytes, expected" in run("advise", path, *ASK).error


def test_code_of_a_known_family_is_not_run_and_not_needed(run: Any, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    path = written(tmp_path, GOOD | {"auto_map": {"AutoConfig": "evil.Config"}})
    assert run("advise", path, *ASK).code == 0


QUESTIONS = {
    ("--hardware", "t5", "--lengths", "1k"): "hardware is 't5' (did you mean t4?), expected one of v100-sxm-32gb",
    ("--hardware", "0xt4", "--lengths", "1k"): "hardware is '0xt4', expected one of",
    (
        "--hardware",
        "t4",
        "--lengths",
        "p50=4k,p99=2k",
    ): "p99 is 2048 and p50 is 4096, expected percentiles that do not fall",
    ("--hardware", "t4", "--lengths", "p50=0"): "lengths: p50 is '0', expected tokens from 1",
    ("--hardware", "t4", "--lengths", "p50=-5"): "lengths: p50 is '-5', expected tokens",
    ("--hardware", "t4", "--lengths", "p200=5"): "lengths has 'p200=5', expected percentiles",
    ("--hardware", "t4", "--lengths", "8k"): "lengths go to 8,192 tokens and the model to 4,096",
    ("--hardware", "t4", "--lengths", "p50=1k,max=512"): "max is 512 and p50 is 1024",
    ("--hardware", "t4", "--lengths", "nowhere.txt"): "lengths is 'nowhere.txt', expected percentiles",
    (*ASK, "--target", "speed=1s"): "target has 'speed', expected ttft",
    (*ASK, "--target", "ttft=fast"): "target ttft is 'fast', expected a time",
    (*ASK, "--quality", "purple"): "quality has 'purple', expected words such as recall",
    (*ASK, "--concurrency", "0"): "concurrency",
    (*ASK, "--shared", "1k"): "shared is 1024, expected less than the 1,024 tokens",
    (*ASK, "--dtype", "int3"): "dtype is 'int3', expected float32",
    ("--lengths", "1k"): "advise got no --hardware",
    ("--hardware", "t4"): "advise got no --lengths",
}


@pytest.mark.parametrize("options", QUESTIONS, ids=" ".join)
def test_a_question_that_makes_no_sense_is_named(run: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    error = run("advise", written(tmp_path, GOOD), *options).error
    assert QUESTIONS[options] in error


def test_a_model_that_is_not_there_names_those_that_are(run: Any) -> None:
    error = run("advise", "llama-9", *ASK).error
    assert error.startswith("llama-9 is not there, expected a config.json") and "llama-3-8b" in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "has 0 tables, expected one processor"),
        ("[a]\nmemory = 1", "a.bandwidth is missing"),
        (
            "[a]\nmemory = 0\nbandwidth = 1\nrates = {float32 = 1}\nsource = 's'",
            "a.memory is 0, expected a number above 0",
        ),
        ("[a]\nmemory = 1\nbandwidth = 1\nrates = {float32 = 1}\nsource = 's'\nspeed = 2", "a.speed is not known"),
        ("[a", "is no TOML"),
    ],
)
def test_hardware_of_ones_own_is_checked(run: Any, tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    error = run("advise", "smollm2-135m", "--hardware", path, "--lengths", "1k").error
    assert str(path) in error and expected in error


def test_lengths_of_a_file_are_checked(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("12\nmany\n")
    error = run("advise", "smollm2-135m", "--hardware", "t4", "--lengths", path).error
    assert error.startswith(f"{path} line 2 is 'many', expected tokens")


def test_nothing_is_imported_for_bad_input_help_or_an_answer(process: Any, tmp_path: Path) -> None:
    watched = """
import atexit
def heavy():
    found = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
    assert not found, f"{found} was imported"
    print("nothing imported", file=sys.stderr)
atexit.register(heavy)
"""
    for arguments, code in (
        (("--help",), 0),
        ((written(tmp_path, GOOD | {"num_attention_heads": 0}), *ASK), 2),
        (("smollm2-135m", *ASK), 0),
    ):
        done = process("advise", *arguments, before=watched)
        assert done.code == code and "nothing imported" in done.err, done.err


def test_a_first_answer_takes_less_than_a_second(process: Any) -> None:
    timed = """
import atexit, time
atexit.register(lambda: print(f"seconds={time.process_time()}", file=sys.stderr))
"""
    done = process("advise", "deepseek-v4-pro", "--hardware", "8xb200", "--lengths", "p50=4k,p99=1M", before=timed)
    assert done.code == 0
    assert float(done.err.rpartition("seconds=")[2]) < 1.0
