"""The parts of the bench: sizes and floors, results, limits, who else uses the machine."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit import bench, native
from attnkit.bench import base, calls, checks, host, memory, peers, probes, sizes, states, timing
from attnkit.mechanisms.softmax import cpu
from attnkit.registry import get

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(not native.STATUS.available, reason=f"no limits: {native.STATUS.reason}")
RESULT = bench.Result(
    id="K1",
    suite="softmax",
    peer="SDPA",
    work="prefill",
    model="a toy",
    threads=2,
    rounds=7,
    others=0.0,
    spread=0.01,
    ours_ms=1.0,
    peer_ms=3.0,
    rate=300.0,
    unit="GFLOP/s",
    limit=400.0,
    ratio=3.0,
    share=0.75,
    floor_ratio=3.0,
    floor_most=None,
    floor_share=0.75,
    floor_exponent=None,
)


def test_the_sizes_beside_the_results_are_those_of_the_package() -> None:
    assert (ROOT / "benchmarks" / "sizes.toml").read_bytes() == sizes.SIZES.read_bytes()


def test_floors() -> None:
    """Those of our plan, by figure, type and whether the backward counts."""
    ratios = {(c.id, c.dtype, c.backward, c.floors.ratio) for c in bench.cases() if c.floors.ratio is not None}
    assert ratios == {
        ("K1", "float32", False, 2.2),
        ("K2", "bfloat16", False, 4.0),
        ("K3", "float16", False, 2.0),
        ("K3", "float16", True, 6.0),
        ("K4", "float32", True, 1.8),
        ("K4", "bfloat16", True, 2.5),
        ("K5", "float32", False, 3.0),
        ("K5", "bfloat16", False, 20.0),
        ("K8", "bfloat16", False, 1.6),
        ("K8", "bfloat16", False, 2.3),
        ("K8", "bfloat16", False, 1.5),
        ("K11", "bfloat16", False, 2.5),
        ("K12", "float32", False, 5.0),
        ("K12", "float32", True, 10.0),
        ("K13", "bfloat16", False, 4.0),
    }
    most = {(case.id, case.floors.most) for case in bench.cases() if case.floors.most is not None}
    assert most == {("K3", 1.3), ("K7", 1.08), ("K9", 1.3), ("K10", 1.4)}
    shares = {(case.id, case.floors.share) for case in bench.cases() if case.floors.share is not None}
    assert shares == {("K1", 0.75), ("K2", 0.65), ("K5", 0.8), ("K6", 0.8), ("K11", 0.6)}
    assert {case.title for case in bench.cases() if case.floors.exponent} == {
        "retention", "gla", "deltanet", "gated deltanet", "kda",
    }  # fmt: skip


def test_every_floor_is_judged_somewhere_and_a_floor_of_a_ratio_has_a_peer() -> None:
    for case in bench.cases():
        if case.floors.ratio is not None or case.floors.most is not None:
            assert case.peer is not None
        assert case.floors.ratio is None or case.floors.most is None
    for figure in {case.id for case in bench.cases()}:
        judged = [case.floors for case in bench.cases([figure])]
        assert any(one.ratio or one.most or one.share for one in judged)


def test_a_part_of_the_work_is_its_share_of_visible_pairs() -> None:
    windows, blocks = bench.cases(["K9"]), bench.cases(["K10"])
    n = 32768
    for case, size in zip(windows, (128, 1024, 4096), strict=True):
        pairs = size * (size + 1) // 2 + (n - size) * size
        assert case.part == pytest.approx(pairs / (n * (n + 1) / 2), rel=1e-6)
    assert [case.part for case in blocks] == pytest.approx([0.02, 0.1, 0.5, 0.1], rel=0.1)
    assert {case.part for case in bench.cases() if case.floors.most is None} == {1.0}


def test_prefill_covers_masks_head_sizes_and_lengths() -> None:
    for figure in ("K1", "K2"):
        chosen = bench.cases([figure])
        for mask in ("causal()", None):
            for d in (64, 128):
                assert any(case.mask == mask and case.sizes.d == d for case in chosen)
        lengths = {case.sizes.n for case in chosen}
        assert {1024, 2048, 4096, 8192} <= lengths and max(lengths) <= 8192
        assert all(not case.decodes for case in chosen)


def test_decoding_covers_the_lengths_and_judges_the_share_at_one() -> None:
    chosen = bench.cases(["K5"])
    assert all(case.decodes and (case.sizes.h, case.sizes.g, case.sizes.d) == (32, 8, 128) for case in chosen)
    assert {4096, 32768, 65536} <= {case.sizes.n for case in chosen}
    assert {case.sizes.n for case in chosen if case.floors.share is not None} == {32768}


def test_every_size_says_whose_it_is_and_every_figure_has_a_quick_one() -> None:
    assert all(case.model for case in bench.cases())
    quick = bench.cases(quick=True)
    assert {case.id for case in quick} == {case.id for case in bench.cases()}
    assert sum(case.expected_seconds for case in quick) < 90
    assert sum(case.expected_seconds for case in bench.cases()) < 720
    assert all(case.quick for case in quick) and len(quick) < len(bench.cases())


def test_figures_are_chosen_by_name() -> None:
    assert {case.id for case in bench.cases(["K5", "K1"])} == {"K1", "K5"}
    with pytest.raises(ValueError, match="no figure 'K99': name some of K1, K2, K3"):
        bench.cases(["K99"])
    assert {case.id for case in bench.cases(suite=["latent", "sparse"])} == {"K11", "K13"}
    with pytest.raises(ValueError, match="no suite 'dense': name some of softmax, decode, latent, linear, sparse"):
        bench.cases(suite=["dense"])


def test_work_in_words() -> None:
    words = [case.work for case in bench.cases()]
    assert "prefill causal fp32 h9/3 d64 n2048" in words
    assert "decode bf16 h32/8 d128 n32768" in words
    assert "kda train fp32 h8 d64 n16384" in words and "nsa bf16 h16/1 d192/128 m1024 n32768" in words
    assert len({(case.id, case.work) for case in bench.cases()}) == len(words)
    assert bench.split("decode bf16 h32/8 d128 n32768") == ("decode bf16 h32/8 d128", 32768)


def test_costs_are_the_textbook_ones() -> None:
    for case in bench.cases(["K1", "K2", "K5"]):
        s, itemsize = case.sizes, getattr(torch, case.dtype).itemsize
        pairs = s.m * s.n if case.mask is None or case.decodes else s.n * (s.n + 1) // 2
        assert case.cost().flops == 4 * s.h * pairs * s.d
        if case.decodes:
            assert case.cost().bytes == pytest.approx(2 * s.g * s.n * s.d * itemsize, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"ratio": 2.99}, False),
        ({"share": 0.74}, False),
        ({"share": 0.1, "floor_share": None}, True),
        ({"wrong": "off by one", "ratio": None, "share": None}, False),
        ({"ratio": 1.3, "floor_ratio": None, "floor_most": 1.3}, True),
        ({"ratio": 1.31, "floor_ratio": None, "floor_most": 1.3}, False),
        ({"ratio": None, "floor_ratio": None}, True),
        ({"ours_ms": None, "share": None, "ratio": None, "refused": "there is no kernel"}, False),
    ],
    ids=["just", "slower", "less of the limit", "share not judged", "wrong", "at most", "too much", "alone", "refused"],
)
def test_a_row_holds_when_it_is_right_and_no_floor_is_missed(changes: dict[str, Any], holds: bool) -> None:
    result = dataclasses.replace(RESULT, **changes)
    assert result.holds is holds
    assert result.line()["kind"] == "kernel" and result.line()["holds"] is holds


def test_lines_are_rounded_to_what_a_noisy_machine_can_say() -> None:
    line = dataclasses.replace(RESULT, ours_ms=1.23456789, peer_ms=12345.6789).line()
    assert (line["ours_ms"], line["peer_ms"]) == (1.235, 12350.0)


@needs_native
def test_the_check_sees_a_kernel_that_is_slightly_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = bench.cases(["K2"], quick=True)[0], bench.cases(["K5"], quick=True)[-1]
    assert [case.dtype for case in chosen] == ["bfloat16", "bfloat16"]
    assert all(checks.check(case) is None for case in chosen)
    right = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda **call: right(**call | {"scale": call["scale"] * 1.01}))
    assert all(checks.check(case) is not None for case in chosen)


@needs_native
def test_limits() -> None:
    found = bench.limits([1])
    assert set(found.fma_gflops) == set(found.read_gbs) == {1}
    assert found.fma_gflops[1] > 1 and found.read_gbs[1] > 0.1
    assert (found.dot_gflops is not None) is (native.get_level() == "v4bf16")
    line = found.line()
    assert line["kind"] == "limits" and line["fma_gflops"]["1"] == round(found.fma_gflops[1], 1)


@needs_native
def test_a_level_without_dot_products_is_measured_by_its_multiply_adds() -> None:
    with native.use_level(native.STATUS.levels[0]):
        assert bench.limits([1]).dot_gflops is None
        probe = probes.Probe("dot", 1)
        probe()
        assert probe.best > 1


def test_a_probe_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([3.0, 5.0, 4.0])
    monkeypatch.setattr(native, "fma_gflops", lambda threads, seconds: next(figures))
    probe = probes.Probe("fma", 1)
    for _ in range(3):
        probe()
    assert probe.best == 5.0


def test_our_own_work_is_not_counted_as_that_of_others() -> None:
    others = host.Others()
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    busy = others.cores()
    assert 0 <= busy <= bench.cores() + 0.5


def test_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([100.0, 107.0])
    monkeypatch.setattr(host, "_busy_seconds", lambda: next(seconds))
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "process_time", iter([50.0, 52.0]).__next__)
    assert host.Others().cores() == pytest.approx(0.5)


def test_a_system_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "STAT", tmp_path / "none")
    assert host.Others().cores() == 0


def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench.commit()
    assert found is None or len(found.removesuffix("+")) == 12
    monkeypatch.setattr(host, "checkout", lambda: None)
    assert bench.commit() is None


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert bench.commit() is None


def test_each_call_is_judged_by_the_limit_it_met():
    probed = [1.0, 3.0, 2.0, 5.0, 4.0, 1.0]  # before ours, before torch's, before ours, ...
    assert timing._limits(probed, 2, moving=True) == [3.0, 5.0, 4.0]
    assert timing._limits(probed, 2, moving=False) == [5.0, 5.0, 5.0]


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="peak memory is read from /proc, which this system does not have")
def test_memory_tells_a_table_of_all_pairs_from_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight heads of 4,000 x 4,000 float32 logits are 488 MiB, and a training call keeps more than one such table."""
    lean = memory.measure(get("forgetting"), "training", n=4000)
    monkeypatch.setenv("ATTNKIT_BACKEND", "reference")
    square = memory.measure(get("forgetting"), "training", n=4000)
    assert (lean.backend, square.backend) == ("cpu" if native.STATUS.available else "chunk", "reference")
    assert square.mib > 2 * 488 > 488 > lean.mib > 0


def test_memory_is_judged_by_its_limit() -> None:
    held, missed = (memory.Peak("path", "forward", "chunk", 8192, mib) for mib in (2047.9, 2048.0))
    assert held.holds and not missed.holds
    assert missed.line()["kind"] == "memory" and missed.line()["holds"] is False


def test_memory_on_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none")
    with pytest.raises(NotImplementedError, match="this system does not have: use Linux"):
        next(bench.peaks())


@pytest.mark.parametrize("kind", states.KINDS)
def test_what_a_state_stands_for_can_be_read(kind: str) -> None:
    k, v = torch.randn(2, 2, 70, 32), torch.randn(2, 2, 70, 16)
    found = states.held(states.filled(kind, k, v))
    assert [x.shape for x in found] == [k.shape, v.shape]
    assert all((x - y).abs().max() < 1 for x, y in zip(found, (k, v), strict=True))


@needs_native
@pytest.mark.parametrize("suite", bench.suites())
def test_a_row_without_its_kernel_says_why(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row crashes where a backend, a state or a level is missing."""
    monkeypatch.setattr(native, "STATUS", native.Status(available=False, reason="it was struck by lightning"))
    case = min(bench.cases(suite=[suite]), key=lambda case: case.sizes.n * case.sizes.g * case.sizes.d)
    row = bench.measure(case)
    assert row.refused and row.ours_ms is None and not row.holds
    assert "struck by lightning" in row.refused or "has no" in row.refused
    assert row.line()["refused"] == row.refused


def test_a_peer_of_ours_is_the_same_call_but_for_what_it_changes() -> None:
    window, half = bench.cases(["K9"])[0], next(c for c in bench.cases(["K3"]) if c.peer and c.peer.dtype)
    small = dataclasses.replace(window, sizes=dataclasses.replace(window.sizes, m=300, n=300))
    work = calls.work(small)
    assert work.peer is not None and not torch.equal(work.ours(), work.peer())
    full = dataclasses.replace(small, mask="causal()")
    assert torch.equal(calls.work(full).ours(), work.peer())
    small = dataclasses.replace(half, sizes=dataclasses.replace(half.sizes, m=64, n=64), backward=False)
    peer = calls.work(small).peer
    assert peer is not None and peer().dtype == torch.float32


def test_ragged_sequences_are_charged_for_the_keys_they_have() -> None:
    case = next(case for case in bench.cases(["K6"]) if case.inputs == "ragged")
    lengths = calls.lengths(case.sizes)
    assert (int(lengths[0]), int(lengths[-1])) == (512, 8192)
    assert calls.amount(case) == pytest.approx(case.cost().bytes * lengths.double().mean() / 8192)


@needs_native
def test_a_window_that_is_one_key_too_long_is_seen_in_the_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.cases(["K9"])[0]
    case = dataclasses.replace(case, sizes=dataclasses.replace(case.sizes, m=400, n=400), dtype="float32")
    work = calls.work(case)
    assert checks.check_rows(case, work.given, work.ours()) is None
    wide = calls.work(dataclasses.replace(case, mask="window(129)")).ours()
    assert "in the last 8 rows" in str(checks.check_rows(case, work.given, wide))


def test_exponents() -> None:
    def line(work: str, ms: float | None, within: float | None = 0.05) -> dict[str, Any]:
        changes = {"work": work, "ours_ms": ms, "floor_exponent": within}
        return dataclasses.replace(RESULT, **changes).line()

    lengths = (4096, 16384, 65536)
    linear = [line(f"kda n{n}", 3e-3 * n) for n in lengths]
    worse = [line(f"gla n{n}", 3e-3 * n**1.06) for n in lengths]
    few = [line("retention n4096", 1.0), line("retention n16384", 4.0), line("retention n65536", None)]
    free = [line(f"mha n{n}", n**2.0, None) for n in lengths]
    one, other = bench.exponents([*linear, *worse, *few, *free])
    assert (one.work, one.lengths, one.holds) == ("kda", lengths, True)
    assert one.exponent == pytest.approx(1.0, abs=0.01)
    assert (other.work, other.holds) == ("gla", False) and other.exponent == pytest.approx(1.06, abs=0.01)


def test_lines_of_the_first_benches_are_read() -> None:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*-v4bf16.jsonl")):
        rows = [line for line in bench.read(path) if line["kind"] == "kernel"]
        assert rows and all(line.keys() >= {"suite", "peer", "peer_ms", "floor_most", "refused"} for line in rows)
    old = {"kind": "kernel", "id": "K5", "sdpa_ms": 2.0, "flex_ms": 3.0}
    new = bench.upgraded(old)
    assert (new["suite"], new["peer"], new["peer_ms"], new["also_ms"]) == ("decode", "SDPA", 2.0, {"flex": 3.0})
    assert bench.upgraded(new) is new


def test_peers_that_are_missing_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"--peers needs openvino, .*pip install 'attnkit\[peers\]'"):
        peers.require(["openvino"])
    peers.require(["flex"])


def test_a_commit_that_git_does_not_know_is_refused() -> None:
    if bench.checkout() is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    lines = base.compare([], "no-such-commit")
    assert next(lines)["settings"]["base"] == "no-such-commit"
    with pytest.raises(ValueError, match="git -C failed, it said: .*no-such-commit"):
        next(lines)
    with pytest.raises(ValueError, match="got '--force', expected a commit"), base.built(ROOT, "--force"):
        pass


@needs_native
def test_two_packages_take_turns() -> None:
    """This package stands for both commits: times come in pairs, and a case that cannot run says which refused."""
    prefill = next(case for case in bench.cases(["K1"]) if case.sizes.n == 1024)
    refused = bench.cases(["K11"])[-1]
    with base._Driver(bench.PACKAGE) as old, base._Driver(bench.PACKAGE) as new:
        found = base._timed(prefill, old, new)
        assert found["old_ms"] > 0 and found["new_ms"] > 0 and 0.2 < found["ratio"] < 5 and found["refused"] is None
        if not any(backend.name == "cpu" for backend in refused.spec.backends):
            assert base._timed(refused, old, new)["refused"].startswith("base: mla has no backend")
