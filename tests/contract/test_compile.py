"""``torch.compile(fullgraph=True)`` as the first thing a fresh process does, and the custom operators under it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch

import attnkit
from attnkit import native
from attnkit.registry import get, mechanisms
from attnkit.testing import runs
from attnkit.testing.lanes import Lane
from attnkit.testing.runs import assert_results_within

# Mechanism, compiler behind the graphs, whether sizes are dynamic. Inductor compiles C++, and what it makes of a graph
# is torch's business; dynamic sizes take Dynamo 30 s for some graphs that take 0.4 s without. One mechanism gets both.
FRESH = [*((name, "aot_eager", name == "softmax") for name in mechanisms()), ("softmax", "inductor", True)]


@pytest.mark.parametrize(("name", "compiler", "dynamic"), FRESH)
def test_compile_first_in_a_fresh_process(name: str, compiler: str, dynamic: bool) -> None:
    """Forward in one graph, other lengths without another one once sizes are dynamic, and training; each backend."""
    script = f"""
        import torch
        from attnkit.dispatch import decide
        from attnkit.registry import get
        from attnkit.spec import Sizes
        from attnkit.testing import runs

        spec = get({name!r})
        torch.set_num_threads(1)

        def sampled(n):
            return spec.sample(n, Sizes(b=2, h=4, g=2, m=n, n=n, d=16, e=8), torch.float32)

        def attempt(backend, train):
            torch._dynamo.reset()
            compiled = torch.compile(spec.function, fullgraph=True, dynamic={dynamic!r}, backend={compiler!r})
            for n in (17, 50) if {dynamic!r} else (17,):
                arguments = sampled(n)
                found = runs.results(compiled(**arguments, backend=backend))
                assert (n == 17) or torch._dynamo.utils.counters["frames"]["total"] == frames, "it compiled again"
                frames = torch._dynamo.utils.counters["frames"]["total"]
                true, plain = runs.gold(spec, arguments), runs.naive(spec, arguments)
                runs.assert_results_within(found, true, plain, torch.float32)
            if train:
                leaves = {{key: x.requires_grad_() for key, x in runs.tensors(arguments).items()}}
                runs.results(compiled(**arguments, backend=backend))[0].sum().backward()
                assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves.values())

        attempt(None, train={compiler!r} != "inductor")
        if {compiler!r} != "inductor":
            taken = decide(spec, spec.call(**sampled(17)))[0].name
            for other in spec.backends:
                if other.name not in (taken, "flex"):
                    attempt(other.name, other.grad)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:attnkit", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, check=False, timeout=110, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_softmax_flex_compiled() -> None:
    """FlexAttention as users get it: compiled, with a mask and every score rule it has."""
    spec = get("softmax")
    arguments = spec.sample(0, None, torch.float32)
    arguments |= {"mask": attnkit.window(9) | attnkit.global_tokens(2), "softcap": 5.0, "alibi": torch.rand(4)}
    with Lane(spec, "flex").entered(compiled=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = runs.run(spec, "flex", arguments)
    assert_results_within(found, runs.gold(spec, arguments), runs.naive(spec, arguments), torch.float32)


def operator_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """Arguments for each custom operator of the package: more than one sequence, ragged lengths, each feature."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 70, 16), torch.randn(2, 2, 70, 8)
    dense = torch.rand(2, 1, 9, 70) < 0.5
    far = 1 << 62
    plain = (q, k, v, None, far, 0, 0.25, None, None, 0.0, None, 0.0, None, False)
    rich = (
        q,
        k,
        v,
        dense,
        far,
        far,
        0.25,
        torch.randn(2, 4, 9, 70),
        torch.rand(4),
        2.0,
        torch.randn(4),
        0.3,
        torch.tensor(7),
        True,
    )
    trained = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in rich]
    o, lse = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9)
    slopes = (q.detach(), k.detach(), v.detach(), o, lse, lse * 1e-7, torch.randn_like(o), torch.randn_like(lse), dense)
    slopes += (
        far,
        far,
        0.25,
        torch.randn(2, 1, 9, 70),
        torch.rand(4),
        2.0,
        torch.randn(4),
        0.3,
        torch.tensor(7),
        [True, True, False, True, True, True],
    )
    # Keys of 10 + 6 channels and values of 8 for 4 heads, from latents of 12.
    latent = (q.detach(), torch.randn(2, 1, 70, 12 + 6), torch.randn(4, 10 + 8, 12), far, 0, 0.25)
    softmax = [("softmax", plain), ("softmax", tuple(trained)), ("softmax_backward", slopes), ("latent", latent)]
    return softmax + gates_and_documents() + sums_that_fade()


def gates_and_documents() -> list[tuple[str, tuple[Any, ...]]]:
    """Softmax attention under gates, and of packed documents with an empty one, and their gradients."""
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 70, 16), torch.randn(2, 2, 70, 8)
    total = -torch.rand(2, 4, 70, dtype=torch.float64).cumsum(-1)
    packed = (q[0], k[0], v[0], torch.tensor([0, 3, 3, 9]), torch.tensor([0, 20, 30, 70]))
    settings, sink = (1 << 62, 0, 0.25), torch.randn(4)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("forgetting", (q, k, v, total, 0.25, False)),
        ("softmax_varlen", (*packed, *settings, None, 0.0, None, False)),
    ]
    gates = [x.clone().requires_grad_() for x in (q, k, v, total)]
    calls.append(("forgetting", (*gates, 0.25, True)))
    leaves = [x.clone().requires_grad_() for x in packed[:3]]
    alibi, own = torch.rand(4), sink.clone().requires_grad_()
    calls.append(("softmax_varlen", (*leaves, *packed[3:], *settings, alibi, 2.0, own, True)))
    o, lse, d_o = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9), torch.randn(2, 4, 9, 8)
    calls.append(("forgetting_backward", (q, k, v, total, o, lse, lse * 1e-7, d_o, 0.25, [True, True, False, True])))
    kept = (alibi, sink, o[0], lse[0].flatten(), lse[0].flatten() * 1e-7, d_o[0])
    calls.append(("softmax_varlen_backward", (*packed, *kept, *settings, 2.0, [True, False, True, True])))
    return calls


def sums_that_fade() -> list[tuple[str, tuple[Any, ...]]]:
    """A call with a map, means and padding, one with the delta rule, and their gradients."""
    q, k, v = torch.rand(2, 4, 9, 16), torch.rand(2, 2, 70, 16), torch.rand(2, 2, 70, 8)
    keep = torch.arange(70).remainder(5).ne(0).repeat(2, 1)
    means = (q, k, v, None, None, None, 1.0, keep, "elu", True)
    unit = torch.nn.functional.normalize(k, dim=-1).repeat_interleave(2, 1)
    beta, decays, state = torch.rand(2, 4, 70), -torch.rand(2, 4, 70, 16), torch.randn(2, 4, 16, 8)
    delta = (unit, unit, v, decays, beta, state, 0.25, None, None, False)
    calls: list[tuple[str, tuple[Any, ...]]] = [("recurrence", (*means, False))]
    for given, decay in ((means, False), (delta, True)):
        leaves = [
            x.clone().requires_grad_() if i < 6 and isinstance(x, torch.Tensor) else x for i, x in enumerate(given)
        ]
        calls.append(("recurrence", (*leaves, True)))
        o, last, *kept = torch.ops.attnkit.recurrence(*given, True) if native.STATUS.available else [q] * 5
        calls.append(("recurrence_backward", (*given, o, *kept, torch.randn_like(o), torch.randn_like(last), decay)))
    return calls


@pytest.mark.skipif(not native.STATUS.available, reason=f"no native library: {native.STATUS.reason}")
@pytest.mark.parametrize(("name", "arguments"), operator_calls())
def test_operator_check(name: str, arguments: tuple[Any, ...]) -> None:
    """Schema, fake shapes and strides, and AOT dispatch agree with the real operator."""
    torch.library.opcheck(getattr(torch.ops.attnkit, name), arguments)


def test_every_operator_is_checked() -> None:
    names = [name.removeprefix("attnkit::") for name in torch._C._dispatch_get_all_op_names() if "attnkit::" in name]
    assert {name.partition(".")[0] for name in names} == {name for name, _ in operator_calls()}
