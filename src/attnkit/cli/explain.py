"""``attnkit explain``."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnkit.cli.output import Json, console, emit, table
from attnkit.dispatch import DEFAULT_BACKEND, decide
from attnkit.masks import Mask
from attnkit.masks.text import parse
from attnkit.positions import alibi_slopes
from attnkit.registry import get
from attnkit.spec import Call, Cost, Mechanism, Sizes

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
# Counting the visible pairs of a mask looks at its tiles; past this many pairs that takes seconds.
MOST_PAIRS = 1 << 34


def verb(
    name: Annotated[str, typer.Argument(help="A mechanism: see attnkit list.")],
    b: Annotated[int, typer.Option("--b", min=1, help="Batch.")] = 1,
    h: Annotated[int, typer.Option("--h", min=1, help="Query heads.")] = 8,
    g: Annotated[int | None, typer.Option("--g", min=1, help="KV heads; as many as query heads.")] = None,
    m: Annotated[int | None, typer.Option("--m", min=0, help="Queries; as many as keys.")] = None,
    n: Annotated[int, typer.Option("--n", min=0, help="Keys.")] = 1024,
    d: Annotated[int, typer.Option("--d", min=1, help="Key size.")] = 64,
    e: Annotated[int | None, typer.Option("--e", min=1, help="Value size; that of keys.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the tensors.")] = "float32",
    mask: Annotated[str | None, typer.Option(help="As for attnkit mask; the mechanism's usual one if absent.")] = None,
    softcap: Annotated[float | None, typer.Option(help="Soft-cap of the logits.")] = None,
    sink: Annotated[bool, typer.Option("--sink", help="A learned sink logit a head.")] = False,
    alibi: Annotated[bool, typer.Option("--alibi", help="ALiBi slopes.")] = False,
    grad: Annotated[bool, typer.Option("--grad", help="Gradients are wanted.")] = False,
    backend: Annotated[str | None, typer.Option(help="Ask for this backend, as backend= does.")] = None,
    json: Json = False,
) -> None:
    """Say which backend would run a call, why each other one would not, and what the call costs.

    Nothing is computed and no memory is taken, so any size can be asked about.

    Examples:

        attnkit explain softmax
        attnkit explain softmax --h 32 --g 8 --d 128 --m 1 --n 131072 --dtype bfloat16
        attnkit explain softmax --mask "window(256) | global_tokens(4)" --softcap 30 --grad
    """
    spec = get(name)
    sizes = Sizes(b, h, g or h, n if m is None else m, n, d, e or d)
    settings: dict[str, Any] = {}
    if mask is not None:
        settings["mask"] = parse(mask)
    if softcap is not None:
        settings["softcap"] = softcap
    if sink:
        settings["sink"] = torch.zeros(h)
    if alibi:
        settings["alibi"] = alibi_slopes(h)
    found = explanation(spec, sizes, getattr(torch, dtype), settings, grad=grad, backend=backend)
    if json:
        emit(found)
    else:
        show(spec, found)


def explanation(
    spec: Mechanism, sizes: Sizes, dtype: torch.dtype, settings: dict[str, Any], *, grad: bool, backend: str | None
) -> dict[str, Any]:
    """The call, its cost, the backend that runs it, and the verdict of every backend with its reasons."""
    accepted = inspect.signature(spec.function).parameters
    for setting in settings:
        if setting not in accepted:
            raise ValueError(f"{spec.name} has no {setting}, expected settings among {', '.join(accepted)}")
    if backend is not None:
        spec.backend(backend)
    _check_volume(sizes)
    # Fake tensors have sizes and a type but no memory: reasons depend on nothing else.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(grad):
        arguments = spec.sample(0, sizes, dtype) | settings
        if grad:
            for value in arguments.values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.requires_grad_()
        call = spec.call(**arguments)
        verdicts = [_verdict(spec, call, candidate.name) for candidate in spec.backends]
        try:
            chosen = decide(spec, call, backend)[0].name
        except NotImplementedError:
            chosen = None
    mask: Mask | None = arguments.get("mask")
    cost = _cost(spec, sizes, mask, dtype)
    return {
        "mechanism": spec.name,
        "call": {name: list(value.shape) for name, value in arguments.items() if isinstance(value, Tensor)},
        "dtype": str(dtype).removeprefix("torch."),
        "mask": mask and repr(mask),
        "grad": grad,
        "cost": cost and asdict(cost),
        "named": backend or DEFAULT_BACKEND,
        "chosen": chosen,
        "backends": verdicts,
    }


def _check_volume(s: Sizes) -> None:
    elements = s.b * max(s.h * s.m * s.d, s.g * s.n * max(s.d, s.e))
    if elements > 1 << 48:
        raise ValueError(f"a tensor of this call has {elements} elements, expected at most 2**48: make a size smaller")


def _verdict(spec: Mechanism, call: Call, name: str) -> dict[str, Any]:
    candidate = spec.backend(name)
    if refusals := candidate.rejects(call):
        return {"name": name, "verdict": "refuses", "reasons": list(refusals)}
    if objections := candidate.declines(call):
        return {"name": name, "verdict": "only when named", "reasons": list(objections)}
    return {"name": name, "verdict": "can run", "reasons": []}


def _cost(spec: Mechanism, sizes: Sizes, mask: Mask | None, dtype: torch.dtype) -> Cost | None:
    """What the call costs; None where counting it would take longer than anyone waits."""
    if sizes.m * sizes.n > MOST_PAIRS:
        return None
    known = {"mask": mask, "itemsize": dtype.itemsize}
    return spec.cost(sizes, **{key: known[key] for key in inspect.signature(spec.cost).parameters if key in known})


def show(spec: Mechanism, found: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{spec.name}[/]  {spec.title}")
    out.print(f"  {spec.equation}   ({', '.join(spec.papers)})", markup=False)
    shapes = ", ".join(f"{name} {tuple(size)}" for name, size in found["call"].items())
    wanted = ", with gradients" if found["grad"] else ""
    mask = f"mask {found['mask']}" if found["mask"] else "no mask"
    out.print(f"\ncall  {shapes}, {found['dtype']}, {mask}{wanted}", markup=False)
    if found["cost"]:
        out.print(f"cost  {cost_sentence(found['cost'])}")
    out.print()
    rows = table("backend", "", "why")
    for backend in found["backends"]:
        runs = backend["name"] == found["chosen"]
        verdict = "runs" if runs else backend["verdict"]
        style = "bold green" if runs else "dim" if backend["verdict"] == "can run" else ""
        rows.add_row(backend["name"], verdict, "\n".join(backend["reasons"]), style=style)
    out.print(rows)
    if found["chosen"] is None:
        out.print(f"\n{found['named']} was named and cannot run this; a named backend never falls back.")


def cost_sentence(cost: dict[str, int]) -> str:
    per_token, fixed = cost["state_bytes_per_token"], cost["state_bytes_fixed"]
    parts = [f"{quantity(per_token, 'B')} a token"] if per_token else []
    parts += [f"{quantity(fixed, 'B')} whatever the length"] if fixed else []
    state = f"; decoding keeps {' and '.join(parts)}" if parts else ""
    return f"{quantity(cost['flops'], 'FLOP')}, at least {quantity(cost['bytes'], 'B')} moved{state}"


def quantity(value: float, unit: str) -> str:
    """``1.5 GFLOP``, ``4.1 kB``: three digits and a decimal prefix."""
    prefixes = list("kMGTP")
    prefix = ""
    while value >= 1000 and prefixes:
        value, prefix = value / 1000, prefixes.pop(0)
    return f"{value:.3g} {prefix}{unit}"
