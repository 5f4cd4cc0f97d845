"""The native library: its interface as Python sees it, its instruction levels, and what is said without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

import attnkit
from attnkit import native
from attnkit.mechanisms.softmax import cpu
from attnkit.native import linear
from attnkit.testing.budgets import assert_within

ROOT = Path(__file__).parents[2]
HEADER = "".join(path.read_text() for path in (ROOT / "csrc" / "abi.h", *sorted((ROOT / "csrc" / "abi").glob("*.h"))))
DECLARATIONS = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)

needs_library = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)

KINDS = {
    "int32_t": c_int32,
    "int64_t": c_int64,
    "float": c_float,
    "double": c_double,
    "const char*": c_char_p,
    # A struct goes over as packed bytes.
    **{f"const attnkit_{name}*": c_char_p for name in native.STRUCTS},
}


def kind(declared: str) -> type:
    return KINDS.get(declared) or {True: c_void_p}[declared.endswith("*")]


def test_structs_match_the_headers():
    assert sorted(re.findall(r"typedef struct attnkit_(\w+)", DECLARATIONS)) == sorted(native.STRUCTS)


@pytest.mark.parametrize("name", native.STRUCTS)
def test_struct_matches_the_header(name):
    body = re.search(rf"typedef struct attnkit_{name} \{{(.*?)\}} attnkit_{name};", DECLARATIONS, re.S)[1]
    fields = []
    for line in filter(None, (line.strip() for line in body.split(";"))):
        declared, names = re.fullmatch(r"((?:const )?\w+\*?) (.*)", line, re.S).groups()
        fields += [(name.strip(), kind(declared)) for name in names.split(",")]
    assert fields == list(native.STRUCTS[name])


def test_functions_match_the_header():
    functions = {}
    lines = re.sub(r"\s+", " ", DECLARATIONS)
    for result, name, arguments in re.findall(r"ATTNKIT_EXPORT ([\w ]+\*?) (attnkit_\w+)\((.*?)\);", lines):
        declared = [] if arguments == "void" else [argument.strip() for argument in arguments.split(",")]
        functions[name] = (kind(result), tuple(kind(re.sub(r" \w+$", "", argument)) for argument in declared))
    assert functions == native.FUNCTIONS


def test_constants_match_the_header():
    constants = {name: int(value) for name, value in re.findall(r"#define ATTNKIT_(\w+) (\d+)$", HEADER, re.M)}
    assert constants.pop("ABI_VERSION") == native.ABI_VERSION
    assert constants.pop("BLOCK_QUERIES") == native.BLOCK_QUERIES
    assert constants.pop("BLOCK_KEYS") == native.BLOCK_KEYS
    assert (constants.pop("PREFILL"), constants.pop("DECODE")) == (native.PREFILL, native.DECODE)
    assert constants.pop("LINEAR_SPAN") == linear.SPAN
    kinds = tuple(constants.pop(f"DECAY_{kind}") for kind in ("NONE", "TOKEN", "CHANNEL"))
    assert kinds == (linear.DECAY_NONE, linear.DECAY_TOKEN, linear.DECAY_CHANNEL)
    maps = tuple(constants.pop(f"MAP_{kind}") for kind in ("NONE", "ELU", "RELU"))
    assert maps == (linear.MAP_NONE, linear.MAP_ELU, linear.MAP_RELU)
    assert {str(dtype): constants.pop(str(dtype).removeprefix("torch.").upper()) for dtype in native.DTYPES} == {
        str(dtype): number for dtype, number in native.DTYPES.items()
    }
    names = {None: "PLAIN", "int8": "INT8", "fp8": "FP8", "int4": "INT4"}
    assert {form: constants.pop(names[form]) for form in native.cache.FORMS} == native.cache.FORMS
    assert constants.pop("OK") == 0
    assert sorted(constants.values()) == sorted(native.ERRORS), "one sentence for each status code"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **source, **environment}, capture_output=True, text=True
    )


@needs_library
def test_a_forced_level_runs():
    lowest = native.STATUS.levels[0]
    ran = python("from attnkit import native; print(native.get_level())", ATTNKIT_CPU_LEVEL=lowest)
    assert ran.stdout.strip() == lowest, ran.stderr


@needs_library
def test_a_level_that_does_not_run_is_an_error():
    body = "import torch, attnkit; x = torch.ones(1, 1, 2, 2); attnkit.softmax_attention(x, x, x, backend='cpu')"
    ran = python(body, ATTNKIT_CPU_LEVEL="v9")
    assert "cpu: ATTNKIT_CPU_LEVEL is 'v9', expected one of" in ran.stderr.splitlines()[-1]
    with pytest.raises(ValueError, match="set_level got 'v9', expected one of"):
        native.set_level("v9")


@needs_library
@pytest.mark.parametrize("level", native.STATUS.levels)
def test_levels_and_both_kernels_agree(level, monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 40, 59), torch.randn(2, 2, 150, 59), torch.randn(2, 2, 150, 111)
    gold = attnkit.softmax_attention(q.double(), k.double(), v.double(), mask=attnkit.causal(), backend="reference")
    naive = attnkit.softmax_attention(q, k, v, mask=attnkit.causal(), backend="reference")
    for most in (0, 48):
        monkeypatch.setattr(cpu, "MOST_DECODE_QUERIES", most)
        with native.use_level(level):
            assert native.get_level() == level
            got = attnkit.softmax_attention(q, k, v, mask=attnkit.causal(), backend="cpu")
        assert_within(got, gold, naive, q.dtype)


@needs_library
@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("queries", [1, 5, 100])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_batch(level, queries, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, n, 64).to(dtype) for heads, n in ((4, queries), (2, 1100), (2, 1100)))
    threads = torch.get_num_threads()
    try:
        with native.use_level(level):
            runs = []
            for count in (1, 2):
                torch.set_num_threads(count)
                runs.append(attnkit.softmax_attention(q, k, v, mask=attnkit.causal(), backend="cpu"))
            alone = attnkit.softmax_attention(q[1:2], k[1:2], v[1:2], mask=attnkit.causal(), backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert runs[0].equal(runs[1])
    assert runs[0][1:2].equal(alone)


@needs_library
@pytest.mark.parametrize("queries", [1, 20])
def test_results_lie_as_their_queries_do(queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, 16) for n, heads in ((queries, 4), (30, 2), (30, 2)))
    turned = attnkit.softmax_attention(*(x.transpose(1, 2) for x in (q, k, v)), backend="cpu")
    plain = attnkit.softmax_attention(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), backend="cpu")
    assert turned.transpose(1, 2).is_contiguous() and plain.is_contiguous()
    assert turned.equal(plain)


@needs_library
def test_pieces_of_a_prompt_have_the_bits_of_the_whole():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 500, 64) for _ in range(3))
    whole = attnkit.softmax_attention(q, k, v, mask=attnkit.window(130), backend="cpu")
    for begin, end in ((0, 77), (77, 290), (290, 500)):
        piece = attnkit.softmax_attention(
            q[:, :, begin:end], k[:, :, :end], v[:, :, :end], mask=attnkit.window(130), backend="cpu"
        )
        assert piece.equal(whole[:, :, begin:end])


@needs_library
@pytest.mark.parametrize("mask", [None, attnkit.window(7), attnkit.dilated_window(5, 3)], ids=repr)
def test_compiles_in_one_graph(mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 30, 16) for _ in range(3))

    def call(q, k, v):
        return attnkit.softmax_attention(q, k, v, mask=mask, backend="cpu", return_lse=True)

    for got, expected in zip(torch.compile(call, fullgraph=True, backend="eager")(q, k, v), call(q, k, v), strict=True):
        assert got.equal(expected)


@needs_library
def test_limits_are_measured():
    threads = 1
    assert native.fma_gflops(threads, 0.01) > 0
    assert (native.bf16_dot_gflops(threads, 0.01) > 0) == (native.get_level() == "v4bf16")
    assert native.read_gigabytes(torch.zeros(1 << 20), threads, 0.01) > 0


def test_reasons_carry_values():
    q = torch.zeros(1, 2, 3, 600)
    call = attnkit.get("softmax").call(q, q, q[..., :8], scale=2.0**31)
    reasons = "; ".join(cpu.rejects(call))
    assert "key size is 600, the native kernel takes 1 to 576" in reasons
    assert "scale is 2147483648.0, the native kernel takes -65536 to 65536" in reasons


def test_without_the_library_the_package_works_and_says_why(tmp_path):
    package = tmp_path / "attnkit"
    subprocess.run(["cp", "-r", str(ROOT / "src" / "attnkit"), str(package)], check=True)
    (package / "native" / native.LIBRARY).unlink(missing_ok=True)
    ran = python(
        "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'\n"
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import attnkit, torch\n"
        "q = torch.ones(1, 1, 2, 4)\n"
        "print(attnkit.explain(attnkit.softmax_attention, q, q, q))\n"
        "attnkit.softmax_attention(q, q, q)"
    )
    assert ran.returncode == 0, ran.stderr
    assert "sdpa runs" in ran.stdout
    assert "cpu: the native library is missing" in ran.stdout
