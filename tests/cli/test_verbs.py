"""What each verb says, to people and to machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attnkit
from attnkit import bench, native
from attnkit.cli import app, explain
from attnkit.dispatch import decide
from attnkit.masks.text import CONSTRUCTORS, parse
from attnkit.models.hybrids import HYBRIDS
from attnkit.positions import alibi_slopes
from attnkit.registry import mechanisms

SPEC = attnkit.get("softmax")
VERBS = ("list", "explain", "mask", "doctor", "advise", "bench", "compare", "parity", "new")


def test_help_names_every_verb(run: Any) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        done = run(*arguments)
        assert done.code == 0
        assert all(f" {verb} " in done.out for verb in VERBS)
    assert {command.name for command in app.registered_commands} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example_and_has_json(run: Any, verb: str) -> None:
    done = run(verb, "--help")
    assert done.code == 0
    assert f"attnkit {verb}" in done.out.partition("Examples:")[2]
    assert "--json" in done.out


def test_version(run: Any) -> None:
    assert run("--version").out.strip() == attnkit.__version__


def test_list_shows_every_mechanism_preset_and_backend(run: Any) -> None:
    text = run("list").out
    for spec in mechanisms().values():
        assert spec.title in text and spec.equation in text
        assert all(preset.title in text for preset in spec.presets)
        assert all(backend.name in text for backend in spec.backends)
    assert all((hybrid.name in text) == hybrid.installed for hybrid in HYBRIDS)


def test_list_for_machines(run: Any) -> None:
    found = {entry["name"]: entry for entry in run("list", "--json").json}
    assert set(found) == set(mechanisms())
    softmax = found["softmax"]
    assert [backend["name"] for backend in softmax["backends"]] == [backend.name for backend in SPEC.backends]
    assert [preset["name"] for preset in softmax["presets"]] == [preset.name for preset in SPEC.presets]
    assert softmax["laws"]["causal"] is True
    assert softmax["state"] == "KVState" and softmax["cost"]["state_bytes_per_token"] == 2 * 8 * 64 * 4
    assert all(entry["papers"] and entry["cost"]["flops"] > 0 for entry in found.values())


CALLS: dict[str, tuple[list[str], dict[str, Any], bool]] = {
    "plain": ([], {}, False),
    "softcap": (["--softcap", "20"], {"softcap": 20.0}, False),
    "sink": (["--sink"], {"sink": torch.zeros(8)}, False),
    "alibi": (["--alibi"], {"alibi": alibi_slopes(8)}, False),
    "gradients": (["--grad"], {}, True),
    "all": (["--softcap", "5", "--sink", "--grad"], {"softcap": 5.0, "sink": torch.zeros(8, requires_grad=True)}, True),
}


@pytest.mark.parametrize(("options", "settings", "grad"), CALLS.values(), ids=CALLS.keys())
def test_explain_decides_as_a_real_call(run: Any, options: list[str], settings: dict[str, Any], grad: bool) -> None:
    found = run("explain", "softmax", "--n", "33", "--json", *options).json
    q, k, v = (torch.randn(1, 8, 33, 64, requires_grad=grad) for _ in range(3))
    call = SPEC.call(q, k, v, mask=attnkit.causal(), **settings)
    assert found["chosen"] == decide(SPEC, call)[0].name
    assert found["call"]["q"] == [1, 8, 33, 64]
    refused = {entry["name"]: entry["reasons"] for entry in found["backends"] if entry["verdict"] == "refuses"}
    for backend in SPEC.backends:
        assert list(backend.rejects(call)) == refused.get(backend.name, [])


def test_explain_prints_refusals_with_their_values(run: Any) -> None:
    text = run("explain", "softmax", "--softcap", "12.5", "--dtype", "float64").out
    assert "softcap is 12.5" in text
    assert "torch.float64" in text
    assert "reference" in text


def test_explain_a_named_backend_that_cannot(run: Any) -> None:
    done = run("explain", "softmax", "--softcap", "12.5", "--backend", "sdpa")
    assert done.code == 0 and "never falls back" in done.out
    found = run("explain", "softmax", "--softcap", "12.5", "--backend", "sdpa", "--json").json
    assert found["chosen"] is None and found["named"] == "sdpa"


def test_explain_takes_no_memory(run: Any) -> None:
    found = run("explain", "softmax", "--h", 64, "--g", 8, "--d", 128, "--m", 1, "--n", 1 << 24, "--json").json
    assert found["call"]["k"] == [1, 8, 1 << 24, 128]
    assert found["cost"]["state_bytes_per_token"] == 2 * 8 * 128 * 4
    assert found["cost"]["flops"] == 4 * 64 * (1 << 24) * 128


def test_explain_reads_masks(run: Any) -> None:
    found = run("explain", "softmax", "--mask", "window(16)", "--json").json
    assert found["mask"] == "window(16)"
    assert found["cost"]["state_bytes_per_token"] == 0 and found["cost"]["state_bytes_fixed"] > 0


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (999, "999 B"), (4096, "4.1 kB"), (2.5e9, "2.5 GB"), (1e19, "1e+04 PB")]
)
def test_quantities(value: float, shown: str) -> None:
    assert explain.quantity(value, "B") == shown


MASKS = {
    "causal()": attnkit.causal(),
    " window( 128 ) ": attnkit.window(128),
    "window(size=128)": attnkit.window(128),
    "causal() & (window(8) | global_tokens(4))": attnkit.causal() & (attnkit.window(8) | attnkit.global_tokens(4)),
    "~symmetric_window(3) & full()": ~attnkit.symmetric_window(3) & attnkit.full(),
    "global_tokens([0, 7])": attnkit.global_tokens([0, 7]),
    "global_tokens((0, 7))": attnkit.global_tokens([0, 7]),
    "dilated_window(8, dilation=2)": attnkit.dilated_window(8, 2),
    "fixed(8, 2) | strided(8)": attnkit.fixed(8, 2) | attnkit.strided(8),
    "chunked(8) & prefix(0)": attnkit.chunked(8) & attnkit.prefix(0),
    "bigbird(256, 32, seed=1)": attnkit.bigbird(256, 32, seed=1),
}


@pytest.mark.parametrize("text", MASKS)
def test_masks_are_read(text: str) -> None:
    assert parse(text) == MASKS[text]


def test_every_numeric_mask_can_be_written() -> None:
    assert set(CONSTRUCTORS) == {name for text in MASKS for name in CONSTRUCTORS if f"{name}(" in text}
    assert all(CONSTRUCTORS[name] is getattr(attnkit, name) for name in CONSTRUCTORS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "window",
        "window(",
        "window()",
        "window(1, 2)",
        "window(3.5)",
        "window(True)",
        "window('a')",
        "window(10**9)",
        "window(99999999999999999999)",
        "window(-3)",
        "window(*[3])",
        "window(**{'size': 3})",
        "window(len([1]))",
        "windw(3)",
        "explicit(1)",
        "causal() and window(3)",
        "causal() + window(3)",
        "not causal()",
        "causal().dense(1, 1)",
        "attnkit.causal()",
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "[c for c in ()]",
        "causal() if 1 else full()",
        "global_tokens([[1]])",
        "causal()\x00",
        "(" * 400 + "causal()" + ")" * 400,
        "~" * 900 + "causal()",
        "causal() | " * 200 + "causal()",
    ],
)
def test_everything_else_in_a_mask_is_refused(run: Any, text: str) -> None:
    assert run("mask", text).error


def test_mask_draws(run: Any) -> None:
    done = run("mask", "window(2)", "--n", "4")
    assert done.out.splitlines() == ["window(2): 4 queries x 4 keys", "■ · · ·", "■ ■ · ·", "· ■ ■ ·", "· · ■ ■"]
    found = run("mask", "window(2)", "--n", "4", "--m", "2", "--json").json
    assert found["picture"] == ["· ■ ■ ·", "· · ■ ■"]
    assert found["visible_share"] == 0.5


def test_doctor_tells_what_is_here(run: Any) -> None:
    text = run("doctor").out
    for fact in (attnkit.__version__, torch.__version__, bench.cpu_model(), "ATTNKIT_CPU_LEVEL"):
        assert fact in text
    found = run("doctor", "--json").json
    assert found["native"]["available"] is native.STATUS.available
    assert found["native"]["levels_here"] == list(native.STATUS.levels)
    states = {row["backend"]: row["state"] for row in found["backends"] if row["mechanism"] == "softmax"}
    assert states["reference"] == states["sdpa"] == "runs"
    assert states["flex"] == "when named"
    assert states["cpu"] == ("runs" if native.STATUS.available else "refuses")


def test_doctor_without_the_native_library(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STATUS", native.Status(available=False, reason="it was struck by lightning"))
    text = run("doctor").out
    assert "missing: it was struck by lightning" in text
    assert "refuses" in text


def test_doctor_with_a_native_library_that_does_not_load(process: Any) -> None:
    broken = """
import ctypes
class Broken(ctypes.CDLL):
    def __init__(self, name, *rest, **options):
        if "attnkit" in str(name):
            raise OSError(f"{name}: file too short")
        super().__init__(name, *rest, **options)
ctypes.CDLL = Broken
"""
    done = process("doctor", before=broken)
    assert done.code == 0
    assert "missing: the native library" in done.out
    assert "reference  runs" in done.out


def test_doctor_prints_although_parts_are_broken(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("[red] herring")

    monkeypatch.setattr(bench, "cpu_model", broken)
    monkeypatch.setattr("attnkit.mechanisms.softmax.sdpa.forward", broken)
    done = run("doctor")
    assert done.code == 0
    assert "broken: ZeroDivisionError: [red] herring" in done.out
    found = run("doctor", "--json").json
    assert found["cpu"] == {"broken": "ZeroDivisionError: [red] herring"}
    states = {row["backend"]: row["state"] for row in found["backends"]}
    assert states["sdpa"] == "broken" and states["reference"] == "runs"
    monkeypatch.setattr("attnkit.cli.doctor.mechanisms", broken)
    assert "the mechanisms cannot be listed" in run("doctor").out


def test_doctor_tells_what_compare_misses(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnkit.cli.doctor.PACKAGES", ("typer", "no-such-package"))
    assert "missing: no-such-package" in run("doctor").out


def test_compare_passes_on_what_was_asked(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from attnkit import compare

    seen: list[compare.CompareOptions] = []
    monkeypatch.setattr(compare, "run", seen.append)
    text = tmp_path / "a.txt"
    text.write_text("to be or not to be")
    options = ["--quick", "--text", text, "--mechanisms", "mha, gqa", "--seeds", "3,4", "--tokenizer", "bytes"]
    assert run("compare", *options, "--out", tmp_path / "r", "--resume").code == 0
    assert seen == [
        compare.CompareOptions(
            text=(text,),
            quick=True,
            mechanisms=("mha", "gqa"),
            seeds=(3, 4),
            tokenizer="bytes",
            out=tmp_path / "r",
            resume=True,
        )
    ]


def test_compare_says_how_to_go_on_after_ctrl_c(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from attnkit import compare

    def stopped(options: compare.CompareOptions) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run", stopped)
    done = run("compare", "--out", tmp_path)
    assert done.code == 130
    assert "--resume" in done.err and len(done.err.splitlines()) == 1
