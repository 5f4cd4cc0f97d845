"""SmolLM2 at long context: Transformers as it comes beside attnkit's attention and cache (K14).

    python -m benchmarks.hf build/models/SmolLM2-135M-Instruct --out benchmarks/results/DATE-hf.jsonl

Both read the same tokens in bfloat16 on one thread, turn by turn, and are timed by the processor time of this process.
A step's attention and cache are what it takes longer at the full context than at 16 tokens. ``--gguf FILE`` adds
llama.cpp, where the package ``llama-cpp-python`` is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import attnkit.hf
from attnkit.bench.host import provenance
from attnkit.bench.results import Line, written
from attnkit.parity.folder import read_folder
from attnkit.parity.loading import load

SHORT = 16
FLOORS = {"decode": 5.0, "prefill": 2.0, "attention": 1.2}  # K14: times as fast twice, then ms per 1000 tokens


class Side:
    """One way to run the model: an attention implementation and its cache."""

    def __init__(self, model: Any, name: str, cache: Callable[[int], Any]) -> None:
        self.model, self.name, self.cache = model, name, cache

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> tuple[float, Any]:
        """Seconds to read ``ids`` ``(1, n)``, and the cache that holds them."""
        self.model.set_attn_implementation(self.name)
        held = self.cache(ids.shape[1] + 512)
        start = time.process_time()
        self.model(ids, cache=held, use_cache=True, logits_to_keep=1)
        return time.process_time() - start, held

    @torch.inference_mode()
    def steps(self, ids: Tensor, held: Any) -> list[float]:
        """Seconds of each step that reads one token of ``ids`` ``(1, m)``."""
        self.model.set_attn_implementation(self.name)
        found = []
        for token in ids.split(1, 1):
            start = time.process_time()
            self.model(token, cache=held, use_cache=True)
            found.append(time.process_time() - start)
        return found


def measure(path: Path, tokens: int, steps: int, rounds: int) -> list[Line]:
    """A line for each side, then one that compares them."""
    folder = read_folder(path)
    model = load(folder, torch.bfloat16)
    attnkit.hf.register()
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
    for _ in range(rounds):
        for name, side in sides.items():
            seconds, held = side.prefill(ids[:, :tokens])
            prefills[name].append(seconds)
            decoded[name][tokens] += side.steps(ids[:, tokens:], held)[1:]
            decoded[name][SHORT] += side.steps(ids[:, :steps], side.prefill(ids[:, :SHORT])[1])[1:]
    lines = [side_line(name, tokens, prefills[name], decoded[name]) for name in sides]
    return [*lines, comparison(lines[0], lines[1])]


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


def llama_cpp(gguf: Path, tokens: int, steps: int) -> Line:
    """The same with llama.cpp, which has weights of four bits, on one thread and by the clock."""
    import llama_cpp

    engine = llama_cpp.Llama(str(gguf), n_ctx=tokens + steps + 8, n_threads=1, n_threads_batch=1, verbose=False)
    ids = torch.randint(3, 49_152, (tokens + steps,), generator=torch.Generator().manual_seed(0)).tolist()
    timed: dict[int, list[float]] = {}
    for n in (SHORT, tokens):
        engine.reset()
        start = time.process_time()
        engine.eval(ids[:n])
        prefill = time.process_time() - start
        timed[n] = []
        for token in ids[n : n + steps]:
            start = time.process_time()
            engine.eval([token])
            timed[n].append(time.process_time() - start)
    return side_line("llama.cpp, Q4", tokens, [prefill], timed)


def show(line: Line) -> None:
    if line["kind"] == "model":
        print(
            f"{line['side']}: prompt {line['prefill_ms'] / 1e3:.2f} s, step {line['step_ms']:.2f} ms, at {SHORT} "
            f"tokens {line['short_step_ms']:.2f} ms: attention, cache {line['attention_ms_per_1000']:.2f} ms per 1000"
        )
    elif line["kind"] == "ratio":
        print(
            f"attnkit is {line['decode']:.2f} times as fast at decoding and {line['prefill']:.2f} at reading the "
            f"prompt; the floors of K14 are {'held' if line['holds'] else 'missed'}: {line['floors']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf", type=Path, help="time llama.cpp on this file too")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / f"{datetime.now(UTC):%Y-%m-%d}-hf.jsonl")
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    settings = {name: getattr(chosen, name) for name in ("tokens", "steps", "rounds")}
    head = provenance({"model": chosen.model.name, "dtype": "bfloat16", "threads": 1, **settings})
    with written(chosen.out) as write:
        write({**head, "transformers": transformers.__version__})
        lines = measure(chosen.model, chosen.tokens, chosen.steps, chosen.rounds)
        if chosen.gguf:
            lines.append(llama_cpp(chosen.gguf, chosen.tokens, chosen.steps))
        for line in lines:
            write(line)
            show(line)


if __name__ == "__main__":
    main()
