"""Linear maps of few tokens: the kernel beside the definition, and models that run it beside models that do not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit.hf
from attnkit import native
from attnkit.hf import linears
from attnkit.testing.budgets import assert_within, used

needs_library = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)
pytestmark = needs_library


@torch.no_grad()
@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", linears.DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (576, 576), (192, 577), (700, 1536)])
def test_maps_are_within_the_budget_and_keep_their_bits(level: str, dtype: torch.dtype, n: int, d: int) -> None:
    generator = torch.Generator().manual_seed(n + d)
    layer = nn.Linear(d, n, dtype=dtype)
    layer.weight.copy_(torch.randn(n, d, generator=generator) * d**-0.5)
    x = torch.randn(2, 3, d, generator=generator).to(dtype)
    threads = torch.get_num_threads()
    runs = []
    try:
        with native.use_level(level):
            for count in (1, 2):
                torch.set_num_threads(count)
                runs.append(linears.linear(layer, x))
            alone = linears.linear(layer, x[1, 2])
    finally:
        torch.set_num_threads(threads)
    assert runs[0].equal(runs[1]) and runs[0][1, 2].equal(alone)
    naive = layer(x)
    assert_within(runs[0], copy.deepcopy(layer).double()(x.double()), naive, dtype)


def test_what_the_kernel_does_not_know_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "run_alone", lambda *call: pytest.fail("the kernel was called"))
    layer, x = nn.Linear(8, 5, dtype=torch.bfloat16), torch.ones(2, 8, dtype=torch.bfloat16)
    many = x.repeat(5, 1)
    assert linears.linear(layer, x).requires_grad
    with torch.no_grad():
        assert linears.linear(layer, many).equal(layer(many))
        assert linears.linear(layer.float(), x.float()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert linears.linear(layer, x.float()).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            linears.linear(layer.bfloat16(), x[:, :7])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek_v3"])
def test_accelerated_steps_are_within_the_budget(
    family: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(3))

    def logits(model: Any) -> Tensor:
        out = model(ids[:, :30], use_cache=True)
        cache = out.get("cache") or out.past_key_values  # before Transformers 5.24
        return torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(30, 40)], 1)

    model = tiny(family, "attnkit", torch.bfloat16)
    naive, gold = logits(model), logits(copy.deepcopy(model).double())
    before = {name: set(vars(layer)) for name, layer in model.named_modules()}
    names = attnkit.hf.accelerate(model)
    assert {name for name, layer in model.named_modules() if type(layer) is nn.Linear} <= set(names)
    calls = []
    plain = native.run_alone
    monkeypatch.setattr(native, "run_alone", lambda name, call: calls.append(name) or plain(name, call))
    got = logits(model)
    assert len(calls) >= 10 * len([name for name in names if "experts" not in name]) - 10
    depth = model.config.num_hidden_layers
    assert used(got, gold, naive, torch.bfloat16, depth=depth).problem is None
    attnkit.hf.restore(model)
    assert before == {name: set(vars(layer)) for name, layer in model.named_modules()}
    assert logits(model).equal(naive)


def test_layers_that_others_changed_are_left_alone(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", "attnkit", torch.bfloat16)
    changed = model.model.layers[0].mlp.gate_proj
    changed.forward = theirs = lambda x: x
    assert "model.layers.0.mlp.gate_proj" not in attnkit.hf.accelerate(model)
    assert changed.forward is theirs
    attnkit.hf.restore(model)
    assert changed.forward is theirs
