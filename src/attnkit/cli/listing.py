"""``attnkit list``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from attnkit.cli.output import Json, console, emit, table
from attnkit.models.hybrids import HYBRIDS
from attnkit.registry import mechanisms
from attnkit.spec import Mechanism, Sizes

COSTED = Sizes(b=1, h=8, g=8, m=4096, n=4096, d=64, e=64)
"""The call whose cost is listed: one sequence, eight heads of 64, float32."""


def verb(json: Json = False) -> None:
    """List the mechanisms, what each computes, its backends and its presets; and the hybrids of presets.

    A mechanism is one equation. A preset is a mechanism with settings: MQA is softmax attention with one KV head.

    Examples:

        attnkit list
        attnkit list --json | jq '.[].presets[].name'
    """
    if json:
        emit([record(spec) for spec in mechanisms().values()])
        return
    out = console()
    for spec in mechanisms().values():
        out.print(f"[bold]{spec.name}[/]  {spec.title}")
        out.print(f"  {spec.equation}", markup=False)
        out.print(f"  backends, first choice first: {', '.join(backend.name for backend in spec.backends)}")
        out.print(f"  {_cost(spec)}", markup=False)
        if spec.presets:
            rows = table("preset", "layer", "source")
            for preset in spec.presets:
                rows.add_row(preset.name, preset.title, preset.paper)
            out.print()
            out.print(rows)
        out.print()
    rows = table("hybrid", "layers in turn", "source")
    for hybrid in (hybrid for hybrid in HYBRIDS if hybrid.installed):
        rows.add_row(hybrid.name, hybrid.layers, hybrid.paper)
    out.print(rows)
    out.print()
    out.print("attnkit explain NAME tells more about one; attnkit compare trains and times them.")


def _cost(spec: Mechanism) -> str:
    cost = spec.cost(COSTED)
    kept = f"{cost.state_bytes_per_token:,} bytes a token" if cost.state_bytes_per_token else ""
    fixed = f"{cost.state_bytes_fixed:,} bytes" if cost.state_bytes_fixed else ""
    state = f"{spec.state.__name__} of {' and '.join(filter(None, (fixed, kept)))}" if spec.state else "no state"
    return f"{cost.flops / 1e9:.3g} GFLOP for 4,096 tokens in 8 heads of 64; {state}"


def record(spec: Mechanism) -> dict[str, Any]:
    """What a machine wants to know of a mechanism."""
    return {
        "name": spec.name,
        "title": spec.title,
        "equation": spec.equation,
        "papers": list(spec.papers),
        "laws": asdict(spec.laws),
        "state": spec.state and spec.state.__name__,
        "cost": {"sizes": asdict(COSTED), **asdict(spec.cost(COSTED))},
        "backends": [{"name": b.name, "grad": b.grad, "finite_only": b.finite_only} for b in spec.backends],
        "presets": [{"name": p.name, "title": p.title, "paper": p.paper} for p in spec.presets],
    }
