"""``attnkit advise``."""

from __future__ import annotations

import json as jsonlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from attnkit.cli.output import Json, console, emit, table

Most = Literal["nothing", "switch", "conversion", "retraining"]


def verb(
    config: Annotated[str | None, typer.Argument(help="config.json, its folder, or a name: see --models.")] = None,
    hardware: Annotated[str, typer.Option(help="Such as h100-sxm or 8xh200, a .toml file, or here.")] = "",
    lengths: Annotated[str, typer.Option(help="p50=2k,p99=96k[,max=128k], or a file, a length a line.")] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests served at once.")] = 1,
    target: Annotated[str, typer.Option(help="ttft=2s,itl=50ms: first token, and every further one.")] = "",
    quality: Annotated[str, typer.Option(help='What has to stay: "recall matters", locality, streaming.')] = "",
    most: Annotated[Most, typer.Option(help="The most effort that is wanted.")] = "retraining",
    train: Annotated[bool, typer.Option("--train", help="The question is how to train it on such lengths.")] = False,
    planned: Annotated[bool, typer.Option("--planned", help="The model is not trained yet.")] = False,
    source: Annotated[str, typer.Option(help="Tokens that cross-attention reads.")] = "",
    shared: Annotated[str, typer.Option(help="Tokens that all prompts start with.")] = "",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; what the model names.")] = None,
    also: Annotated[str, typer.Option(help="Presets of attnkit list to ask about as well, such as moba_4,tpa.")] = "",
    check: Annotated[bool, typer.Option("--check", help="Build layers here and compare; see below.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the answer as a page to this file.")] = None,
    models: Annotated[bool, typer.Option("--models", help="List the models that are known by name.")] = False,
    families: Annotated[bool, typer.Option("--families", help="List the families that can be read.")] = False,
    machines: Annotated[bool, typer.Option("--machines", help="List the hardware that is known by name.")] = False,
    json: Json = False,
) -> None:
    """Say which attention, which cache and which backend a model should have, and why everything else lost.

    It reads a config.json of Transformers; nothing of the model is loaded, and no code of a checkpoint runs. From the
    costs of its layers, the limits of the hardware and the lengths of the traffic it works out bytes, requests that fit
    and the least times, for the model as it is and for other caches, heads and mechanisms. What is asked for has to
    hold at the 99th percentile.

    --check builds one layer of each kind of CONFIG on this machine, or of six known models without one, and compares
    bytes and times with what is predicted: of a step over p99 tokens and of a prompt of p50. It exits with 1 where
    bytes differ or a time is off by more than 1.5.

    Examples:

        attnkit advise llama-3-8b --hardware h100-sxm --lengths p50=2k,p99=8k --concurrency 64
        attnkit advise ./config.json --hardware 8xh200 --lengths lengths.txt --target ttft=2s,itl=50ms
        attnkit advise llama-3-8b --hardware a10 --lengths p50=2k,p99=6k --concurrency 16 --most switch
        attnkit advise llama-3-70b --hardware 2xh100-sxm --lengths p50=4k,p99=8k --quality "recall matters" --json
        attnkit advise --check --lengths p50=2k,p99=8k
    """
    from attnkit.advise.lengths import tokens

    if check:
        _check(config, lengths, dtype, json)
        return
    if models or families or machines:
        _list(models, families, machines, json)
        return
    for name, value in (("CONFIG", config), ("--hardware", hardware), ("--lengths", lengths)):
        if not value:
            raise ValueError(
                f"advise got no {name}, expected it: attnkit advise llama-3-8b --hardware h100-sxm --lengths 8k"
            )
    assert config is not None
    from attnkit.advise.answer import advise
    from attnkit.advise.terminal import show

    efforts = {"switch": "a switch", "conversion": "conversion and healing"}
    answer = advise(
        config,
        hardware=hardware,
        lengths=lengths,
        concurrency=concurrency,
        target=target,
        quality_words=quality,
        most=efforts.get(most, most),
        planned=planned,
        source=tokens(source, "source") if source else 0,
        shared=tokens(shared, "shared") if shared else 0,
        dtype=dtype,
        train=train,
        also=also,
    )
    if html is not None:
        from attnkit.advise.page import write

        write(answer, html, command(sys.argv[1:]))
    if json:
        from attnkit.advise.document import document

        emit(document(answer))
    else:
        show(answer, console())


def _list(models: bool, families: bool, machines: bool, json: bool) -> None:
    from attnkit.advise.families import TABLE, configs
    from attnkit.advise.hardware import table as hardware

    found: dict[str, list[str]] = {}
    if models:
        found["models"] = list(configs())
    if families:
        found["families"] = sorted(TABLE)
    if machines:
        found["machines"] = list(hardware())
    if json:
        print(jsonlib.dumps(found, indent=2))
        return
    for names in found.values():
        print("\n".join(names))


def _check(config: str | None, lengths: str, dtype: str | None, json: bool) -> None:
    """Compare what is predicted for each kind of layer with what is allocated and measured on this machine."""
    from rich.progress import Progress

    from attnkit import bench
    from attnkit.advise.check import PROMPT, TOKENS, Checked, check, models
    from attnkit.advise.lengths import parse
    from attnkit.advise.words import seconds

    sizes = parse(lengths).columns if lengths else {"p50": PROMPT, "p99": TOKENS}
    tokens, prompt = sizes["p99"], sizes["p50"]
    chosen = dict(models(config, dtype))
    lines: list[Checked] = []
    with Progress(console=console(stderr=True), transient=True) as progress:
        for shape, model in progress.track(chosen.items(), description="building and timing layers"):
            lines += check(shape, model, tokens, prompt)
    if json:
        run = bench.provenance({"verb": "advise --check", "tokens": tokens, "prompt": prompt, "threads": 1})
        for line in (run, *(one.line() for one in lines)):
            print(jsonlib.dumps(line, ensure_ascii=False))
        return
    shown = table(
        "", "layer", "bytes", "", "step", "predicted", "prompt", "predicted", "", right=("bytes", "step", "prompt")
    )
    for one in lines:
        times = (one.measured_step, one.predicted_step, one.measured_prompt, one.predicted_prompt)
        cells = ["" if time is None else seconds(time) for time in times]
        equal = "as predicted" if one.bytes_equal else f"predicted {one.predicted_bytes:,}"
        verdict = "within 1.5" if one.within else "apart"
        shown.add_row(one.shape, one.layer, f"{one.allocated_bytes:,}", equal, *cells, verdict)
    console().print(shown)
    console().print(f"A step over {tokens:,} tokens, a prompt of {prompt:,}; one thread.")
    if not all(one.bytes_equal and one.within for one in lines):
        raise typer.Exit(1)


def command(words: list[str]) -> str:
    """What to type to have the same answer again; the file that the page was written to is left out."""
    kept = [word for i, word in enumerate(words) if word != "--html" and (i == 0 or words[i - 1] != "--html")]
    return shlex.join(["attnkit", *(word for word in kept if not word.startswith("--html="))])
