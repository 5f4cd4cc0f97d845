"""The sentences of a report: planted numbers must be told, and nothing that may be noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from attnkit.report import paragraphs
from attnkit.report.measures import bits_per_byte
from attnkit.report.noise import EXACT, Noise, Sample, over_seeds, student_quantile
from attnkit.report.results import read

Line = dict[str, Any]
MakeRun = Callable[..., list[Line]]
ROWS = ("mha", "gqa", "window", "strided")


def told(lines: list[Line]) -> str:
    return "\n".join(paragraphs(lines))


def with_bits(lines: list[Line], bits: dict[str, Sequence[float]]) -> list[Line]:
    """The run with these bits per byte for each row, by seed."""
    return [
        line | {"bits_per_byte": bits[line["row"]][line["seed"]]} if line["kind"] == "text" else line for line in lines
    ]


def with_accuracy(lines: list[Line], accuracy: Callable[[str, int, int], float]) -> list[Line]:
    def answered(line: Line) -> list[Line]:
        return [p | {"accuracy": accuracy(line["row"], p["length"], p.get("pairs", 0))} for p in line["points"]]

    return [line | {"points": answered(line)} if line["kind"] == "task" else line for line in lines]


def with_speed(lines: list[Line], change: Callable[[Line], Line]) -> list[Line]:
    return [line | change(line) if line["kind"] == "speed" else line for line in lines]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_identical_rows_allow_no_claim(make_run: MakeRun, seeds: tuple[int, ...]) -> None:
    lines = make_run(rows=ROWS, seeds=seeds)
    lines = with_bits(lines, dict.fromkeys(ROWS, [2.3 + 0.01 * seed for seed in seeds]))
    lines = with_accuracy(lines, lambda row, length, pairs: 0.99)
    same = {"decode": [{"context": 256, "ms": 1.0}, {"context": 4096, "ms": 1.0}], "cache_allocated": 4096}
    text = told(with_speed(lines, lambda line: same | {"cache_predicted": 4096}))
    assert "no difference in bits per byte can be claimed: all rows lie at" in text
    assert (
        "no row can be distinguished from the best in bits per byte and recall, and their caches are equally large"
        in text
    )
    assert "no row decodes faster than another beyond the noise" in text
    assert "does not grow beyond the noise" in text
    for claim in ("Worse by", "fall behind", "fastest", "lowest", "smallest cache among"):
        assert claim not in text


def test_one_seed_claims_only_beyond_what_is_assumed(make_run: MakeRun) -> None:
    lines = make_run(rows=ROWS)
    inside = told(with_bits(lines, {"mha": [2.30], "gqa": [2.31], "window": [2.33], "strided": [2.349]}))
    assert "no difference in bits per byte can be claimed" in inside
    assert "between 2.300 (MHA) and 2.349 (Strided)" in inside
    assert "One seed cannot show how far chance moves bits per byte, so 0.05 is assumed" in inside
    beyond = told(with_bits(lines, {"mha": [2.30], "gqa": [2.31], "window": [2.33], "strided": [2.351]}))
    assert "MHA has the lowest bits per byte, 2.300; indistinguishable from it: GQA and Sliding window." in beyond
    assert "Worse by more than the noise: Strided (+0.051)." in beyond


def test_seeds_that_agree_show_small_differences_and_seeds_that_do_not_hide_large_ones(make_run: MakeRun) -> None:
    lines = make_run(rows=ROWS, seeds=(0, 1, 2))
    steady = {"mha": [2.300, 2.301, 2.302], "gqa": [2.320, 2.321, 2.322]} | dict.fromkeys(
        ("window", "strided"), [2.340, 2.341, 2.342]
    )
    text = told(with_bits(lines, steady))
    assert "Worse by more than the noise: GQA (+0.020), Sliding window (+0.040) and Strided (+0.040)." in text
    assert "Over 3 seeds the bits per byte of a row vary by 0.001" in text
    shaken = {row: [values[0] - 0.1, values[1], values[2] + 0.1] for row, values in steady.items()}
    assert "no difference in bits per byte can be claimed" in told(with_bits(lines, shaken))


def test_equal_rows_are_called_different_in_at_most_one_run_of_twenty(make_run: MakeRun) -> None:
    lines = make_run(rows=ROWS, seeds=(0, 1, 2))
    chance, claims, runs = random.Random(0), 0, 400
    for _ in range(runs):
        measure = bits_per_byte(
            read(with_bits(lines, {row: [chance.gauss(2.3, 0.02) for _ in range(3)] for row in ROWS}))
        )
        claims += len(measure.leaders()) < len(ROWS)
    # Three standard errors of a share of 5 % over so many runs.
    assert claims / runs < 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def test_student_quantiles_are_those_of_the_tables() -> None:
    tables = {
        (0.05, 1): 12.706,
        (0.05, 2): 4.303,
        (0.05, 5): 2.571,
        (0.01, 7): 3.499,
        (0.05, 16): 2.120,
        (0.001, 30): 3.646,
    }
    for (risk, degrees), value in tables.items():
        assert round(student_quantile(risk, degrees), 3) == value


def test_noise_of_rows_with_unequal_numbers_of_seeds() -> None:
    noise = over_seeds([Sample((1.0, 1.2)), Sample((1.0, 1.2)), Sample((1.1,))], smallest=0.0, assumed=9.0)
    alone, pair = Sample((1.0,)), Sample((1.0, 1.0))
    assert noise.between(alone, alone) > noise.between(alone, pair) > noise.between(pair, pair) > 0
    timed = Noise(relative=0.1)
    assert not timed.separates(Sample((1.0,)), Sample((1.1,)))
    assert timed.separates(Sample((1.0,)), Sample((1.2,)))
    assert EXACT.separates(Sample((1.0,)), Sample((1.0001,)))


def test_windows_that_lose_nothing_are_not_said_to_lose(make_run: MakeRun) -> None:
    text = told(with_accuracy(make_run(rows=ROWS), lambda row, length, pairs: 0.98 if row == "mha" else 0.97))
    assert "no row can be distinguished from the best: all answer at least 97 %" in text
    assert "fall behind" not in text
    assert "distance" not in text


def test_a_window_that_loses_with_length_is_explained_by_distance(make_run: MakeRun) -> None:
    lines = make_run(rows=("mha", "window"))
    far = told(with_accuracy(lines, lambda row, length, pairs: 0.3 if row == "window" and length > 128 else 0.99))
    assert "These fall behind it: Sliding window (30 %)" in far
    assert (
        "At 128 tokens Sliding window cannot be distinguished from the best yet: the loss comes with distance." in far
    )
    assert "The cache of Sliding window holds a fixed number of keys, so what lies further back has left it." in far
    always = told(with_accuracy(lines, lambda row, length, pairs: 0.3 if row == "window" else 0.99))
    assert "These fall behind it: Sliding window (30 %)" in always
    assert "comes with distance" not in always


def test_a_fixed_state_without_a_mask_is_not_said_to_hold_keys(make_run: MakeRun) -> None:
    lines = with_accuracy(make_run(rows=("mha", "window")), lambda row, *_: 0.3 if row == "window" else 0.99)
    text = told([line for line in lines if line["kind"] != "mask"])
    assert "The state of window has a fixed size, which all that was read has to share." in text
    assert "number of keys" not in text


def test_a_mask_that_hides_keys_is_named_as_cause_only_where_it_hides_them(make_run: MakeRun) -> None:
    lines = with_accuracy(make_run(rows=("mha", "gqa", "strided")), lambda row, *_: 0.99 if row == "mha" else 0.4)
    text = told(lines)
    assert "These fall behind it: GQA (40 %) and Strided (40 %)" in text
    assert "By their masks the queries of Strided miss some of the earlier keys" in text


SPAN = "from 4 to 32 pairs in 256 tokens"
RECALLED = {"mha": lambda pairs: 0.99, "gqa": lambda pairs: 0.98, "strided": lambda pairs: 0.97}


def falling(pairs: int) -> float:
    return 1 - pairs / 100


def recalls(**rows: Callable[[int], float]) -> Callable[[str, int, int], float]:
    """Accuracy of each row by pairs; rows without state of fixed size know everything unless said otherwise."""
    known: dict[str, Callable[[int], float]] = {**RECALLED, **rows}
    return lambda row, length, pairs: known[row](pairs)


def test_a_fixed_state_that_loses_pairs_is_said_to_and_growing_caches_not(make_run: MakeRun) -> None:
    text = told(with_accuracy(make_run(rows=ROWS), recalls(window=falling)))
    assert f"States of fixed size lose recall {SPAN}: Sliding window (64 KiB, 96 % to 68 %)." in text
    grown = "MHA (256 KiB), GQA (128 KiB) and Strided (256 KiB)"
    assert f"Growing caches that lose nothing beyond the noise: {grown}." in text
    assert "recall of 32 pairs cannot be distinguished from the best is that of GQA (128 KiB)" in text


def test_a_loss_within_the_noise_is_none(make_run: MakeRun) -> None:
    inside = told(with_accuracy(make_run(rows=ROWS), recalls(window=lambda pairs: 0.99 if pairs == 4 else 0.90)))
    assert f"No state of fixed size loses recall beyond the noise {SPAN}: Sliding window (64 KiB)." in inside
    assert "lose recall" not in inside
    beyond = told(with_accuracy(make_run(rows=ROWS), recalls(window=lambda pairs: 0.99 if pairs == 4 else 0.88)))
    assert "States of fixed size lose recall" in beyond


def test_a_growing_cache_that_loses_too_is_named(make_run: MakeRun) -> None:
    text = told(with_accuracy(make_run(rows=ROWS), recalls(window=falling, strided=falling)))
    assert "Growing caches that lose too: Strided (256 KiB, 96 % to 68 %)." in text
    assert "Growing caches that lose nothing beyond the noise: MHA (256 KiB) and GQA (128 KiB)." in text


def test_a_fixed_state_that_did_not_learn_says_nothing_about_pairs(make_run: MakeRun) -> None:
    rows = (*ROWS, "window_sinks")
    accuracy = recalls(window=lambda pairs: 0.94 - pairs / 50, window_sinks=falling)
    text = told(with_accuracy(make_run(rows=rows), accuracy))
    assert f"States of fixed size lose recall {SPAN}: Window + 4 first tokens (68 KiB," in text
    assert "Not even 4 pairs are recalled from the fixed state of Sliding window (64 KiB), so" in text
    only = told(with_accuracy(make_run(rows=ROWS), accuracy))
    assert "lose recall" not in only
    assert "lose nothing" not in only


def test_without_bytes_of_state_or_fixed_ones_nothing_is_said_of_them(make_run: MakeRun) -> None:
    lines = make_run(rows=ROWS)
    bare = [
        line | {"points": [{k: v for k, v in p.items() if k != "state_bytes"} for p in line["points"]]}
        if line["kind"] == "task"
        else line
        for line in lines
    ]
    assert "of fixed size" not in told(bare)
    assert "of fixed size" not in told(make_run(rows=("mha", "gqa")))


def test_the_layers_of_a_hybrid_are_told_where_models_differ(make_run: MakeRun) -> None:
    lines = make_run(rows=("mha", "window"))
    short, long = ["window", "mha"], ["window"] * 5 + ["mha"]
    mixed = [
        line | {"layers": long if line["kind"] == "text" else short}
        if line.get("row") == "window" and line["kind"] in ("text", "task", "speed")
        else line
        for line in lines
    ]
    text = told(mixed)
    layers = "5 window and 1 mha for the text; 1 window and 1 mha for the tasks and timing"
    assert f"The layers of Sliding window were {layers}." in text


def test_what_nobody_learned_tells_nothing(make_run: MakeRun) -> None:
    lines = with_accuracy(make_run(rows=ROWS), lambda row, length, pairs: 0.5 if row == "mha" else 0.1)
    text = told(lines)
    assert "No row learned recall, so it does not tell the rows apart here: the best, MHA, answers 50 %" in text
    assert "in bits per byte and recall" not in text


def test_the_conclusion_takes_the_smallest_cache_among_the_best(make_run: MakeRun) -> None:
    lines = with_bits(make_run(rows=ROWS), {"mha": [2.30], "gqa": [2.31], "window": [2.40], "strided": [2.31]})
    text = told(with_accuracy(lines, lambda row, *_: 0.2 if row == "strided" else 0.99))
    assert "none of MHA and GQA can be distinguished from the best in bits per byte and recall, so cost decides" in text
    assert "The smallest cache among them is that of GQA: 8 MiB at 4096 tokens, 2 times less than the largest." in text
    assert "of the caches smaller still, the same way, that of Sliding window (256 KiB, 2.400 bits per byte)" in text


def test_rows_that_lead_in_different_things_leave_the_choice_open(make_run: MakeRun) -> None:
    lines = with_bits(make_run(rows=("mha", "window")), {"mha": [2.5], "window": [2.3]})
    text = told(with_accuracy(lines, lambda row, *_: 0.99 if row == "mha" else 0.3))
    assert "no row is with the best in bits per byte and recall at once" in text
    assert "Sliding window leads in bits per byte and MHA leads in recall" in text


def test_decode_times_within_the_noise_are_level(make_run: MakeRun) -> None:
    def steps(line: Line) -> Line:
        last = {"mha": 2.0, "gqa": 1.05, "window": 1.0, "strided": 1.0}[line["row"]]
        return {"decode": [{"context": 256, "ms": 1.0}, {"context": 4096, "ms": last}]}

    text = told(with_speed(make_run(rows=ROWS), steps))
    assert "grows from 256 to 4096 tokens of context by these factors: MHA 2." in text
    assert "It does not grow beyond the noise for GQA, Sliding window and Strided." in text
    assert "the fastest is Sliding window with 1 ms a token (indistinguishable from it: Strided and GQA)" in text


def test_an_unfinished_run_says_so_and_still_speaks(make_run: MakeRun) -> None:
    lines = [x for x in make_run(rows=ROWS) if not (x.get("row") == "window" and x["kind"] in ("text", "speed"))]
    text = told(lines)
    assert (
        "not finished; missing in part or whole: training on the text (Sliding window) and timing (Sliding window)."
        in text
    )
    assert "bits per byte" in text
    assert told([lines[0]]).startswith("This run is not finished")


def test_training_that_diverged_is_said_and_left_out(make_run: MakeRun) -> None:
    lines = with_bits(make_run(rows=ROWS), {"mha": [2.3], "gqa": [float("nan")], "window": [2.3], "strided": [2.3]})
    text = told(lines)
    assert "Training diverged for GQA" in text
    assert "nan" not in text


def test_a_cache_that_is_not_what_was_predicted_is_named(make_run: MakeRun) -> None:
    lines = with_speed(make_run(rows=ROWS), lambda line: {"cache_predicted": 17} if line["row"] == "mha" else {})
    assert "is not the one that was predicted for MHA (16777216 against 17 bytes)" in told(lines)


def test_kernels_that_are_slower_than_torch_or_below_their_floor_are_named(make_run: MakeRun) -> None:
    slow = {"ours_ms": 2.0, "sdpa_ms": 1.0, "ratio": 0.5, "share": 0.2}
    lines = [line | slow if line.get("id") == "K2" else line for line in make_run(rows=ROWS)]
    text = told(lines)
    assert "The native kernels are 0.5 to 26 times as fast as torch's and reach 20 to 84 %" in text
    assert "Not faster than torch beyond the noise: K2 prefill bf16 causal h8 d64 n2048." in text
    assert "Below the floors that attnkit sets itself: K2 prefill bf16 causal h8 d64 n2048." in text
    failed = {"wrong": "0.3 from the definition", "ratio": None, "share": None}
    text = told([line | failed if line.get("id") == "K5" else line for line in lines])
    assert "so without a speed: K5 decode fp32 32/8 d128 n32768 and K5 decode bf16 32/8 d128 n32768." in text


def test_a_busy_machine_widens_the_noise_of_times_and_is_told(make_run: MakeRun) -> None:
    lines = make_run(rows=("mha", "mqa"))
    assert "Other programs" not in told(lines)
    assert "slowest" in told(lines)
    busy = [line | {"spread": 1.2, "others": 1.5} if line["kind"] == "kernel" else line for line in lines]
    text = told(busy)
    assert "Other programs kept 1.5 cores of this machine busy meanwhile" in text
    assert "no row decodes faster than another beyond the noise" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"kind": "run", "format": 7, "attnkit": "9.0"}, "format 7 of attnkit 9.0, this version reads format 1"),
        ({"kind": "text", "row": "mha", "seed": 0}, "has no 'curve'"),
        ({"kind": "surprise"}, "its kind is 'surprise', expected run, limits"),
        ({"kind": "speed", "row": "mha", "prefill_tokens_per_second": "fast"}, "could not convert"),
        (["kind"], "its kind is None"),
    ],
)
def test_a_line_that_cannot_be_read_is_refused_with_its_number(make_run: MakeRun, line: Any, message: str) -> None:
    lines = make_run(rows=ROWS)
    with pytest.raises(ValueError, match=message) as refused:
        paragraphs([*lines, line])
    assert f"line {len(lines) + 1} of the results" in str(refused.value)
    assert "\n" not in str(refused.value)
