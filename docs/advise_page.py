"""Writes what the page "Advice" shows: four answers as the command line prints them, and the claims, checked."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

from rich.console import Console

from attnkit import bench
from attnkit.advise import advise, claims
from attnkit.advise.terminal import show
from attnkit.advise.words import seconds

EXAMPLES = {
    "llama-3-8b": {"hardware": "a10", "lengths": "p50=2k,p99=6k", "concurrency": 16, "most": "a switch"},
    "deepseek-v3": {"hardware": "8xh200", "lengths": "p50=4k,p99=96k", "concurrency": 32, "target": "itl=50ms"},
    "qwen3-next-80b-a3b": {"hardware": "4xh100-sxm", "lengths": "p50=8k,p99=256k", "concurrency": 16},
    "smollm2-135m": {"hardware": "raspberry-pi-5", "lengths": "p50=512,p99=4k", "target": "itl=100ms"},
}
OPTIONS = {"most": {"a switch": "switch"}}


def command(model: str, asked: dict[str, object]) -> str:
    """What to type for an example."""
    words = ["attnkit", "advise", model]
    for name, value in asked.items():
        words += [f"--{name}", str(OPTIONS.get(name, {}).get(str(value), value))]
    return shlex.join(words)


def checked(results: Path) -> str:
    """The newest committed lines of ``attnkit advise --check`` as a table."""
    run, *lines = bench.read(sorted(results.glob("*-advise-check.jsonl"))[-1])
    head = "| | layer | bytes of a state | a step: measured, predicted | a prompt: measured, predicted |"
    rows = [
        f"| {line['shape']} | {line['layer']} | {line['allocated_bytes']:,}, "
        f"{'as predicted' if line['bytes_equal'] else 'not as predicted'} | "
        f"{seconds(line['measured_step'])}, {seconds(line['predicted_step'])} | "
        f"{seconds(line['measured_prompt'])}, {seconds(line['predicted_prompt'])} |"
        for line in lines
    ]
    sizes = (
        f"States and steps of {lines[0]['tokens']:,} tokens, prompts of {lines[0]['prompt']:,}, bfloat16, one thread"
    )
    return (
        "\n".join(
            [f"{sizes}; {run['machine']['cpu']}, {run['started'][:10]}.", "", head, "|---|---|---|---|---|", *rows]
        )
        + "\n"
    )


def write(folder: Path, results: Path) -> None:
    """Write a file for each example, one with the claims, and one with what was checked."""
    folder.mkdir(exist_ok=True)
    (folder / "check.md").write_text(checked(results), encoding="utf-8")
    for model, asked in EXAMPLES.items():
        out = io.StringIO()
        show(advise(model, **asked), Console(file=out, width=150))
        lines = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
        (folder / f"{model}.md").write_text(f"```text\n$ {command(model, asked)}\n{lines}\n```\n", encoding="utf-8")
    (folder / "claims.md").write_text(claims.table(), encoding="utf-8")
