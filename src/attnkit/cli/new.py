"""``attnkit new``."""

from __future__ import annotations

import keyword
import re
import shutil
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from attnkit import bench
from attnkit.cli.output import Json, emit
from attnkit.registry import ENTRY_POINTS, mechanisms

TEMPLATES = Path(__file__).with_name("templates")


def verb(
    name: Annotated[str, typer.Argument(help="Lower case, such as retention; words joined by _.")],
    out: Annotated[
        Path | None, typer.Option(help="Write a package of your own into this folder instead of into attnkit's source.")
    ] = None,
    json: Json = False,
) -> None:
    """Start a mechanism: a folder with its record, its definition, its layer and its page, to be filled in.

    In a source checkout of attnkit it goes into src/attnkit/mechanisms, where every tool and the contract tests find
    it. With --out it becomes a package of its own, which attnkit finds through an entry point.

    Examples:

        attnkit new retention
        attnkit new gated_pooling --out ~/my-attention/src
    """
    _check_name(name)
    if out is None:
        root = bench.checkout()
        if root is None:
            raise ValueError(
                f"attnkit runs from {bench.PACKAGE}, expected a source checkout to add a mechanism to: name a folder "
                "of your own with --out"
            )
        folder, package = bench.PACKAGE / "mechanisms" / name, f"attnkit.mechanisms.{name}"
        check = f"pytest -k {name}"
    else:
        folder, package = out.expanduser() / name, name
        check = f"from attnkit.testing import laws; laws.check({name}.SPEC, 'reference') runs the contract tests"
    files = scaffold(folder, name, package)
    steps = [
        "reference.py: write the definition, in plain torch; it is the answer that everything is measured against",
        "__init__.py: fill in equation, papers, laws and cost; add the arguments your equation needs",
        "page.md: say what it is for and settle what the paper leaves open",
        check,
    ]
    if out is not None:
        steps.insert(3, f'pyproject.toml: [project.entry-points."{ENTRY_POINTS}"] {name} = "{name}:SPEC"')
    if json:
        emit({"name": name, "files": [str(path) for path in files], "next": steps})
        return
    for path in files:
        print(f"wrote {path}")
    print("\nnext:")
    for number, step in enumerate(steps, 1):
        print(f"  {number}. {step}")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"the name is {name!r}, expected a letter, then letters, digits and _, all lower case")
    if name in mechanisms():
        raise ValueError(f"there is a mechanism {name!r} already: choose another name")


def scaffold(folder: Path, name: str, package: str) -> list[Path]:
    """Write the templates into ``folder``, all of them or none; return the files."""
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another name or remove it")
    title = name.replace("_", " ").capitalize()
    words = {"name": name, "package": package, "title": title, "camel": name.title().replace("_", "")}
    part = folder.with_name(f".{name}.part")
    try:
        part.mkdir(parents=True)
        for template in sorted(TEMPLATES.glob("*.txt")):
            text = Template(template.read_text(encoding="utf-8")).substitute(words)
            (part / template.stem).write_text(text, encoding="utf-8")
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return sorted(folder.iterdir())
