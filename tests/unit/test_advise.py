"""The advisor: what it reads, what it works out, and why alternatives lose."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import pytest

from attnkit.advise import advise, from_config
from attnkit.advise.claims import CLAIMS
from attnkit.advise.claims import table as table_of_claims
from attnkit.advise.hardware import find, table
from attnkit.advise.lengths import parse
from attnkit.advise.page import write
from attnkit.advise.words import duration, quality, seconds, size, targets
from attnkit.cli.advise import command

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def test_llama_has_its_published_sizes() -> None:
    model = from_config(LLAMA)
    assert model.weights == 8_030_261_248
    assert model.token_bytes() == 131_072
    assert model.state_bytes(8192) == 1 << 30
    assert model.unknown == ()


def test_what_fits_is_taken_as_it_is() -> None:
    answer = advise(LLAMA, hardware="h100-sxm", lengths="p50=1k,p99=2k,max=4k", concurrency=16)
    assert answer.decision.chosen == "as-is"
    assert answer.chosen.meets
    assert "retraining where nothing has to change" in answer.decision.rejected["linear-hybrid"][0]


def test_every_loser_has_one_sentence_with_numbers() -> None:
    answer = advise(LLAMA, hardware="a10", lengths="p50=2k,p99=6k,max=8k", concurrency=16)
    names = {one.alternative.name for one in answer.ranked} | {one.name for one in answer.unsuited}
    assert set(answer.decision.rejected) == names - {answer.decision.chosen}
    for judged in answer.ranked[1:]:
        (why,) = answer.decision.rejected[judged.alternative.name]
        assert any(c.isdigit() for c in why) and "\n" not in why


def test_targets_name_what_bounds_them() -> None:
    answer = advise(LLAMA, hardware="h100-sxm", lengths="p50=2k,p99=96k", concurrency=1, target="ttft=1s,itl=1ms")
    (why,) = answer.decision.rejected["paged"]
    assert "bound by arithmetic of weights" in why or "bound by arithmetic of attention" in why
    assert "asked for 1 s" in why


def test_times_are_those_of_a_roofline_by_hand() -> None:
    answer = advise(LLAMA, hardware="a100-80gb", lengths="4k", concurrency=8)
    step = answer.base.estimate.column("p99").decode
    body = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096)
    weights = 2 * (body + 4096 * 128256)
    cache = 8 * 4096 * 131_072
    queries = 8 * 32 * 2 * 4096 * 2
    assert step.seconds == pytest.approx((weights + cache + queries) / 2039e9, rel=1e-9)
    assert step.bound == "memory"


def test_percentiles_are_met_and_rise() -> None:
    lengths = parse("p50=2k,p99=96k", 131072)
    assert (lengths.at(0.5), lengths.at(0.99), lengths.worst) == (2048, 98304, 131072)
    values = [lengths.at(i / 200) for i in range(201)]
    assert values == sorted(values)
    assert 2048 < lengths.mean < 98304


def test_a_file_of_lengths_is_a_distribution(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("# tokens\n" + "\n".join(str(n) for n in range(1, 101)) + "\n\n4k\n")
    lengths = parse(str(path))
    assert (lengths.at(0.5), lengths.worst) == (51, 4096)
    assert lengths.at(0.99) == 100


def test_several_processors_are_one_with_all_of_their_memory() -> None:
    one, eight = find("h200"), find("8xh200")
    assert eight.memory == 8 * one.memory and eight.rate("bfloat16") == 8 * one.rate("bfloat16")
    assert all(entry.source and entry.memory > 0 for entry in table().values())


def test_hardware_without_a_type_computes_in_another() -> None:
    assert find("t4").rate("bfloat16") == 65e12
    assert find("raspberry-pi-5").rate("bfloat16") == 0.154e12


def test_words_and_units() -> None:
    assert quality("recall matters").recall and quality("strong locality").local and quality("streaming").streaming
    assert targets("ttft=2s,itl=50ms") == {"ttft": 2.0, "itl": pytest.approx(0.05)}
    assert [size(n) for n in (5, 1 << 20, 70 << 30)] == ["5 B", "1.0 MiB", "70.0 GiB"]
    assert [seconds(t) for t in (2.0, 0.0353, 3e-7)] == ["2 s", "35.3 ms", "0.3 us"]
    assert math.isclose(duration("1.5ms", "t"), 0.0015)


def test_claims_are_all_there_with_the_verdicts_of_their_numbers() -> None:
    verdicts = {claim.number: claim.verdict for claim in CLAIMS}
    assert list(verdicts) == list(range(1, 39))
    assert [n for n, verdict in verdicts.items() if verdict == "W"] == [2, 3, 10, 15, 16, 23, 29, 30, 31]
    checks = {claim.number: claim.check() for claim in CLAIMS}
    for number, words in {
        1: "32.0 GiB for one head",
        2: "75.0% less (131,072 bytes a token for 524,288); 87.5% less",
        4: "98.2% less than as many full heads (3,997,696), 71.9% less than 8 KV heads",
        6: "4.0 GiB with 32 heads and 1.0 GiB with 8",
        13: "24,576 tokens for a width of 4,096",
        14: "a step is bound by memory, a prompt by arithmetic",
        25: "32,768 in all",
        33: "1.3125",
        37: "an H100 has 295",
    }.items():
        assert words in checks[number]
    assert table_of_claims().count("\n") == 40


def test_the_page_stands_alone_and_says_how_to_repeat_it(tmp_path: Path) -> None:
    named = LLAMA | {"_name_or_path": "<b>mine</b>"}
    answer = advise(named, hardware="a10", lengths="p50=2k,p99=6k,max=8k", concurrency=16)
    write(answer, tmp_path / "a.html", "attnkit advise x")
    text = (tmp_path / "a.html").read_text()
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text
    assert "&lt;b&gt;mine&lt;/b&gt;" in text and "<b>" not in text
    assert "<pre>attnkit advise x</pre>" in text
    for judged in answer.ranked[1:]:
        assert escape(answer.decision.rejected[judged.alternative.name][0]) in text
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_the_command_is_repeated_without_the_page() -> None:
    assert command(["advise", "x", "--html", "a b.html", "--lengths", "1k"]) == "attnkit advise x --lengths 1k"


def test_narrow_weights_are_multiplied_at_the_narrow_rate() -> None:
    wide = advise("deepseek-v3", hardware="8xh200", lengths="8k").base.estimate.column("p99").prefill
    slow = advise("deepseek-v3", hardware="8xmi300x", lengths="8k").base.estimate.column("p99").prefill
    body = 2 * 8192 * 36.6e9 / (8 * 1979e12)
    assert body < wide.seconds < 2 * body
    assert slow.seconds < wide.seconds


def test_any_preset_of_the_registry_can_be_asked_about() -> None:
    answer = advise(LLAMA, hardware="h100-sxm", lengths="p50=2k,p99=8k,max=16k", also="softmax/mqa,moba_4")
    found = {one.alternative.name: one for one in answer.ranked}
    assert found["softmax/mqa"].estimate.token == 32 * 2 * 128 * 2
    assert found["moba_4"].estimate.column("p99").cache > 0
    with pytest.raises(ValueError, match="also has 'nothing', expected names of presets"):
        advise(LLAMA, hardware="h100-sxm", lengths="8k", also="nothing")
