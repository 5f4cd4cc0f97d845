"""Writes one page a mechanism from the registry, so that a folder added under mechanisms/ documents itself."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from attnkit.registry import mechanisms
from attnkit.spec import Mechanism, Sizes
from attnkit.testing import samplers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = Sizes(b=1, h=4, g=2, m=32, n=32, d=16, e=8)


def write(folder: Path) -> None:
    """Write ``index.md`` and a page for every mechanism into ``folder``, and remove pages of mechanisms gone."""
    folder.mkdir(exist_ok=True)
    pages = {spec.name: page(spec) for spec in mechanisms().values()}
    pages["index"] = index(mechanisms().values())
    for path in folder.glob("*.md"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # unchanged pages are not built again
            path.write_text(text, encoding="utf-8")


def index(specs: Iterable[Mechanism]) -> str:
    specs = list(specs)
    rows = [(f"[{s.title}]({s.name}.md)", f"`{s.equation}`", f"{len(s.presets)}") for s in specs]
    names = "\n".join(spec.name for spec in specs)
    return (
        "# Mechanisms\n\nA mechanism is one equation; a preset is a mechanism with settings.\n\n"
        f"{table(('mechanism', 'equation', 'presets'), rows)}\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"
    )


def page(spec: Mechanism) -> str:
    """The mechanism's own ``page.md`` between what its record says of it."""
    package = spec.function.__module__
    own = files(package).joinpath("page.md")
    text = own.read_text(encoding="utf-8") if own.is_file() else f"# {spec.title}\n"
    title, _, body = text.partition("\n")
    papers = ", ".join(linked(paper) for paper in spec.papers)
    presets = [(f"`{p.name}`", p.title, linked(p.paper)) for p in spec.presets]
    return "\n".join(
        [
            title,
            f"\n```text\n{spec.equation}\n```\n\nPapers: {papers}.",
            body,
            "## Presets\n\n" + table(("preset", "layer", "paper"), presets) if presets else "",
            "## What each backend runs\n",
            *support(spec),
            f"## Function\n\n```{{eval-rst}}\n.. autofunction:: {package}.{spec.function.__name__}\n```\n",
        ]
    )


def support(spec: Mechanism) -> Iterator[str]:
    """A table of features by backends, as the backends themselves answer, then the reasons of every refusal."""
    rows, reasons = [], []
    for feature, arguments in features(spec):
        call = spec.call(**arguments)
        refused = {backend.name: backend.rejects(call) for backend in spec.backends}
        rows.append((feature, *("no" if why else "yes" for why in refused.values())))
        reasons += [f"- {feature} on `{name}`: {'; '.join(why)}." for name, why in refused.items() if why]
    yield table(("", *(f"`{backend.name}`" for backend in spec.backends)), rows)
    yield "As answered on the machine that built this page:\n"
    yield "\n".join(reasons) + "\n"


def features(spec: Mechanism) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of features, each with arguments of a call that uses it."""
    for dtype in DTYPES:
        yield str(dtype).removeprefix("torch."), spec.sample(0, SIZES, dtype)
    yield "gradients", {name: leaf(value) for name, value in spec.sample(0, SIZES).items()}
    for name in samplers.features(spec):
        yield f"`{name}`", samplers.arguments(spec, random.Random(0), of=SIZES, only=(name,), layouts=False)


def leaf(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.clone().requires_grad_() if floating else value


def linked(paper: str) -> str:
    """``arXiv 1706.03762`` as a link, anything else as it is."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)
