"""Attention over decoding states in place: every form, level and mask against the definition, and bits that stay."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import attnkit
from attnkit import native
from attnkit.mechanisms.softmax.step import SPEC, reference
from attnkit.state import KVState, PagedKVState, PagePool, WindowState
from attnkit.testing.budgets import assert_within
from attnkit.testing.runs import threads

CODECS = [None, "int8", "fp8", "int4"]
needs_library = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)


def tokens(seed: int, b: int, g: int, n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(b, g, n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(codec: Any, n: int, d: int = 64, e: int = 64, dtype: torch.dtype = torch.float32, b: int = 2) -> KVState:
    state = KVState(b, 2, n, d, e, dtype=dtype, codec=codec)
    state.store(tokens(1, b, 2, n, d, dtype), tokens(2, b, 2, n, e, dtype))
    return state


def paged(pool: PagePool, lengths: list[int]) -> PagedKVState:
    """The tokens of ``filled``, the first ``lengths[i]`` of sequence ``i``."""
    state, n = PagedKVState(pool, len(lengths)), max(lengths)
    _, _, d, e, dtype, _ = state.layout
    state.append(tokens(1, len(lengths), 2, n, d, dtype), tokens(2, len(lengths), 2, n, e, dtype), lengths)
    return state


def judge(got: Any, call: dict[str, Any]) -> None:
    """``got`` against float64 over what the codes mean, with the budget of plain arithmetic in the call's dtype."""
    dtype = call["q"].dtype
    arguments = SPEC.call(**call, return_lse=True)
    gold = reference(**(arguments | {"q": call["q"].double()}))
    naive = reference(**arguments)
    for one, best, plain, what in zip(got, gold, naive, ("o", "lse"), strict=True):
        assert_within(one, best, plain.clone(), dtype, what=what)


@needs_library
@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_every_form_agrees_with_the_definition(level: str, codec: Any, dtype: torch.dtype) -> None:
    for n, m, d, e in ((1, 1, 64, 64), (33, 3, 59, 111), (64, 2, 128, 128), (700, 1, 128, 32), (1100, 16, 24, 200)):
        call = {"q": tokens(3, 2, 4, m, d, dtype), "state": filled(codec, n, d, e, dtype)}
        with native.use_level(level):
            judge(attnkit.softmax_attention_step(**call, return_lse=True, backend="cpu"), call)


@needs_library
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "settings",
    [
        {"mask": attnkit.window(50)},
        {"mask": attnkit.dilated_window(9, 5)},
        {"alibi": torch.tensor([0.5, 0.1, 0.02, 0.0])},
        {"softcap": 1.5, "sink": torch.tensor([0.0, 3.0, -1.0, 9.0])},
        {"bias": torch.linspace(-2, 2, 4 * 5 * 300).reshape(1, 4, 5, 300)},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_features_count(codec: Any, settings: dict[str, Any]) -> None:
    call = {"q": tokens(3, 2, 4, 5, 64, torch.float32), "state": filled(codec, 300)}
    got = attnkit.softmax_attention_step(**call, **settings, return_lse=True, backend="cpu")
    judge(got, call | settings)
    assert not got[0].equal(attnkit.softmax_attention_step(**call, backend="cpu")), "the feature changes nothing"


@needs_library
@pytest.mark.parametrize("page", [1, 7, 16, 64])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("queries", [3, 17])  # a row at a time, and as a matrix product
def test_pages_have_the_bits_of_one_buffer(page: int, dtype: torch.dtype, queries: int) -> None:
    pool = PagePool(1200 // page * 2 + 9, page, 2, 64, dtype=dtype)
    pool._free[:] = [pool._free[i] for i in torch.randperm(pool.free).tolist()]
    pool.k.fill_(torch.nan)  # pages of nobody, and slots behind the last token, must not be read
    pool.v.fill_(torch.nan)
    state, q = paged(pool, [1100, 1100]), tokens(3, 2, 4, queries, 64, dtype)
    found = attnkit.softmax_attention_step(q, state, backend="cpu")
    assert found.isfinite().all()
    assert found.equal(attnkit.softmax_attention_step(q, filled(None, 1100, dtype=dtype), backend="cpu"))


@needs_library
@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 7])  # 4 rows a KV head, one at a time, and 28 as a matrix product
def test_repeats_have_the_bits_of_a_sequence_alone(
    level: str, codec: Any, dtype: torch.dtype, m: int, full: bool
) -> None:
    """Alone and in any batch at any place, with one thread and with two; on scattered pages among shorter ones, too."""
    rng, lengths = random.Random(0), [1100, 700, 64, m]
    q, k, v = (tokens(seed, 4, heads, n, 128, dtype) for seed, heads, n in ((3, 8, m), (1, 2, 1100), (2, 2, 1100)))

    def step(rows: list[int], state: Any) -> Any:
        return attnkit.softmax_attention_step(q[rows], state, return_lse=True, backend="cpu")

    def buffer(rows: list[int], n: int) -> KVState:
        state = KVState(len(rows), 2, n, 128, dtype=dtype, codec=codec)
        state.store(k[rows, :, :n], v[rows, :, :n])
        return state

    def on_pages(rows: list[int]) -> PagedKVState:
        page = rng.choice((7, 16, 64) if codec is None else (32, 64))
        pool = PagePool(400, page, 2, 128, dtype=dtype, codec=codec)
        rng.shuffle(pool._free)
        for x in pool.tensors:  # pages of nobody, and slots behind the last token, must not be read
            x.fill_(torch.nan if x.is_floating_point() else 0x7F)
        state = PagedKVState(pool, len(rows))
        state.append(k[rows], v[rows], [lengths[row] for row in rows])
        return state

    with native.use_level(level):
        alone = [step([row], buffer([row], n)) for row, n in enumerate(lengths)]
        for _ in range(50 if full else 4):
            rows = rng.sample(range(4), rng.randint(1, 4))
            rows = rows if 0 in rows else [*rows, 0]
            with threads(rng.choice((1, 2))):
                found = {"one buffer": (step(rows, buffer(rows, 1100)), [0])}
                found["pages"] = step(rows, on_pages(rows)), rows
            for form, (got, compared) in found.items():
                for row in compared:
                    assert all(x[rows.index(row)].equal(y[0]) for x, y in zip(got, alone[row], strict=True)), form


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [512, 576])
def test_sums_of_bytes_fit_their_whole_numbers(size: int, dtype: torch.dtype) -> None:
    state = KVState(1, 1, 40, size, 64, dtype=dtype, codec="int8")
    signs = torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    state.store((signs * torch.ones(size)).to(dtype)[None, None], tokens(2, 1, 1, 40, 64, dtype))
    call = {"q": torch.full((1, 2, 1, size), 0.03, dtype=dtype), "state": state}
    judge(attnkit.softmax_attention_step(**call, return_lse=True, backend="cpu"), call)


@needs_library
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_query_breaks_its_own_row(bad: float) -> None:
    q = tokens(3, 2, 8, 3, 64, torch.bfloat16)
    q[0, 5, 1, 7] = bad
    found = attnkit.softmax_attention_step(q, filled("int8", 90, dtype=torch.bfloat16), backend="cpu").isnan()
    assert found[0, 5, 1].all() and found.sum() == 64


@needs_library
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hidden_nan_does_not_leak(codec: Any, dtype: torch.dtype) -> None:
    state = KVState(1, 2, 200, 64, dtype=dtype, codec=codec)
    k, v = tokens(1, 1, 2, 200, 64, dtype), tokens(2, 1, 2, 200, 64, dtype)
    k[:, :, 100] = v[:, :, 100] = torch.nan
    state.store(k, v)
    q = tokens(3, 1, 4, 3, 64, dtype)
    # The last mask shows the NaN to some rows only. int4 has it in all keys of a group, up to key 127.
    some = attnkit.window(99 - 27 if codec == "int4" else 99)
    for mask in (attnkit.window(60), attnkit.dilated_window(40, 2), attnkit.window(99), some):
        call = {"q": q, "state": state, "mask": mask}
        got = attnkit.softmax_attention_step(**call, return_lse=True, backend="cpu")
        wanted = attnkit.softmax_attention_step(**call, backend="reference")
        assert (got[0].isnan() == wanted.isnan()).all()
    assert got[0].isnan().any() and not got[0].isnan().all()


@needs_library
def test_a_ring_is_read_as_it_is() -> None:
    state = WindowState(2, 2, 20, 64, sinks=2)
    k, v, q = (tokens(i, 2, heads, 50, 64, torch.float32) for i, heads in ((1, 2), (2, 2), (3, 4)))
    for i in range(50):
        state.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        if i in (0, 10, 21, 22, 49):
            for settings in ({}, {"alibi": torch.tensor([0.5, 0.1, 0.02, 0.0])}, {"mask": attnkit.window(7)}):
                call = {"q": q[:, :, i : i + 1], "state": state, **settings}
                judge(attnkit.softmax_attention_step(**call, return_lse=True, backend="cpu"), call)
    with pytest.raises(ValueError, match="a ring that holds 22 of 50 tokens, expected 1 query"):
        attnkit.softmax_attention_step(q[:, :, :2], state)


REFUSALS: list[tuple[Any, type[Exception], str]] = [
    (lambda q, s: attnkit.softmax_attention_step(q, 3), TypeError, "state is a int, expected a KVState"),
    (lambda q, s: attnkit.softmax_attention_step(q[..., :9], s), ValueError, "key size 9 but the state 2 and 64"),
    (lambda q, s: attnkit.softmax_attention_step(q.double(), s), TypeError, "torch.float64 on cpu but the state"),
    (lambda q, s: attnkit.softmax_attention_step(q[:, :3], s), ValueError, "3 query heads and 2 KV heads"),
    (lambda q, s: attnkit.softmax_attention_step(q.expand(2, 4, 9, 64), s), ValueError, "got 9 queries and a sequence"),
    (lambda q, s: attnkit.softmax_attention_step(q, s, mask=q > 0), TypeError, "mask is a Tensor, expected a mask"),
    (lambda q, s: attnkit.softmax_attention_step(q.clone().requires_grad_(), s, backend="cpu"), NotImplementedError,
     "gradients are wanted for q"),
    (lambda q, s: KVState(1, 1, 1, 1, codec="int3"), ValueError, "codec is 'int3', expected None, 'int8'"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "said"), REFUSALS)
def test_refusals_say_what_to_do(act: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        act(tokens(3, 2, 4, 1, 64, torch.float32), filled(None, 5))
    assert said in str(caught.value)


def test_a_mask_the_kernel_cannot_do_for_many_lengths_runs_on_the_reference() -> None:
    state, q = paged(PagePool(50, 16, 2, 64), [300, 200]), tokens(3, 2, 4, 1, 64, torch.float32)
    why = attnkit.explain(attnkit.softmax_attention_step, q, state, mask=attnkit.dilated_window(9, 5))
    assert why.chosen == "reference"
    if native.STATUS.available:
        assert "lengths are [300, 200] and the mask is" in str(why)


@pytest.mark.parametrize("kind", ["paged", "int8"])
@pytest.mark.parametrize("preset", ["gqa", "alibi", "t5"])
def test_a_layer_decodes_through_states_read_in_place(kind: str, preset: str) -> None:
    from attnkit.spec import LayerPlace

    spec = attnkit.get("softmax")
    torch.manual_seed(0)
    layer = spec.layer(spec.preset(preset).configure(LayerPlace(64, 4, 8)))
    c = layer.config
    state: Any = KVState(2, c.groups, 30, c.key_size, c.values, codec="int8")
    if kind == "paged":
        state = PagedKVState(PagePool(20, 4, c.groups, c.key_size, c.values), 2)
    x = torch.randn(2, 30, 64)
    with torch.no_grad():
        whole = layer(x)
        parts = [layer.step(piece, state)[0] for piece in x.split([13, 1, 1, 4, 11], 1)]
        gold = layer.double()(x.double())
    found = torch.cat(parts, 1)
    if kind == "paged":
        assert_within(found, gold, whole, torch.float32)
    else:
        # int8 stays within 3 % of the exact result (relative L2, property P15).
        assert (found - gold).norm() <= 0.03 * gold.norm()
