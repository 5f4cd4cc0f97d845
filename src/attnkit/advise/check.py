"""One layer of each kind is built on this machine: what was predicted beside what is allocated and measured."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from attnkit import bench
from attnkit.advise.allocate import allocate
from attnkit.advise.families import read_config
from attnkit.advise.model import Mixer, Model, describe
from attnkit.masks import causal, window
from attnkit.mechanisms.delta import delta_attention
from attnkit.mechanisms.mla import mla_attention
from attnkit.mechanisms.softmax import softmax_attention, softmax_attention_step

TOKENS, PROMPT, REPEATS, SECONDS = 4096, 1024, 9, 0.05
READ = 128 << 20
FACTOR = 1.5
"""Within which a time that is predicted has to be."""

SHAPES: dict[str, tuple[str, str | None]] = {
    "MHA": ("llama-2-7b", None),
    "GQA": ("llama-3-8b", None),
    "MLA": ("deepseek-v3", None),
    "window hybrid": ("gpt-oss-20b", None),
    "linear hybrid": ("qwen3-next-80b-a3b", None),
    "int8 cache": ("llama-3-8b", "int8"),
}
"""Six kinds of layers that models are made of: a model known by name that has them, and how its cache is kept."""


@dataclass(frozen=True)
class Checked:
    """One kind of layer: bytes of its state for ``tokens``, and seconds of a step and of a prompt; None was not run."""

    shape: str
    layer: str
    dtype: str
    tokens: int
    prompt: int
    predicted_bytes: int
    allocated_bytes: int
    predicted_step: float | None
    measured_step: float | None
    predicted_prompt: float | None
    measured_prompt: float | None

    @property
    def bytes_equal(self) -> bool:
        return self.predicted_bytes == self.allocated_bytes

    @property
    def within(self) -> bool:
        """Whether each time that was measured is within the factor of what was predicted."""
        pairs = ((self.measured_step, self.predicted_step), (self.measured_prompt, self.predicted_prompt))
        return all(a is None or b is None or b / FACTOR <= a <= b * FACTOR for a, b in pairs)

    def line(self) -> dict[str, Any]:
        """The record of a results file."""
        return {"kind": "advise-check", **asdict(self), "bytes_equal": self.bytes_equal, "within": self.within}


def models(config: str | None = None, dtype: str | None = None) -> Iterator[tuple[str, Model]]:
    """What to check and its name: the model of a configuration, or ``SHAPES`` where none is given."""
    for shape, (name, codec) in ({config: (config, None)} if config else SHAPES).items():
        model = read_config(name)
        if codec is not None:
            model = model.map(lambda mixer, _, codec=codec: replace(mixer, codec=codec))  # type: ignore[misc]
        yield shape, model.cast(dtype) if dtype else model


def check(shape: str, model: Model, tokens: int = TOKENS, prompt: int = PROMPT) -> Iterator[Checked]:
    """Check each different layer of ``model`` with one thread, on the limits of this machine, measured beside it."""
    dtype = getattr(torch, model.dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for mixer in model.mixers:
            if not mixer.source and mixer.keeps:
                yield _checked(shape, mixer, dtype, model.itemsize, tokens, prompt)
    finally:
        torch.set_num_threads(threads)


def _checked(shape: str, mixer: Mixer, dtype: torch.dtype, itemsize: int, tokens: int, prompt: int) -> Checked:
    state = allocate(mixer, tokens, dtype, "cpu")
    allocated = state.nbytes if state is not None else 0
    # So many sequences that what a step reads is in no cache of the processor.
    batch = max(1, min(64, -(-READ // mixer.cost(1, tokens, itemsize).bytes)))
    sizes = ((batch, 1, tokens), (1, prompt, prompt))
    times: list[tuple[float | None, float | None]] = []
    for b, m, n in sizes:
        call = _call(mixer, dtype, b, m, n)
        if call is None:
            times.append((None, None))
            continue
        limits = bench.limits([1])
        measured = _seconds(call)
        again = bench.limits([1])
        found = (limits, again)
        rates = [(one.dot_gflops if dtype == torch.bfloat16 else None) or one.fma_gflops for one in found]
        rate, read = max(one[1] for one in rates) * 1e9, max(one.read_gbs[1] for one in found) * 1e9
        cost = mixer.cost(m, n, itemsize)
        part = _reach(mixer, "step" if m == 1 else "prompt")
        predicted = b * max(cost.flops / (rate * part["arithmetic"]), cost.bytes / (read * part["memory"]))
        times.append((predicted, measured))
    (step, took), (whole, took_whole) = times
    expected = mixer.cost(1, tokens, itemsize).state_bytes(tokens)
    name = str(dtype).removeprefix("torch.")
    return Checked(shape, describe(mixer), name, tokens, prompt, expected, allocated, step, took, whole, took_whole)


@cache
def _table() -> dict[str, dict[str, dict[str, float]]]:
    return tomllib.loads((files("attnkit.advise") / "reach.toml").read_text("utf-8"))


def _reach(mixer: Mixer, work: str) -> dict[str, float]:
    """The part of the limits that attnkit's own calls reach, as it was measured."""
    return _table()["window" if mixer.window is not None else mixer.mechanism][work]


def _call(mixer: Mixer, dtype: torch.dtype, b: int, m: int, n: int) -> Callable[[], object] | None:
    """The call of ``m`` tokens of each of ``b`` sequences of ``n``, or None where none is known."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    h, g, d, e = mixer.heads, mixer.groups, mixer.key_size, mixer.value_size
    match mixer.mechanism:
        case "softmax":
            q, k, v = drawn(b, h, m, d), drawn(b, g, n, d), drawn(b, g, n, e)
            mask = causal() if mixer.window is None else window(mixer.window)
            if m > 1:
                return lambda: softmax_attention(q, k, v, mask=mask)
            state: Any = allocate(mixer, n, dtype, "cpu", batch=b)
            state.append(k, v)
            return lambda: softmax_attention_step(q, state, mask=mask)
        case "mla":
            options = dict(mixer.options)
            c, r = options["latent"], options["rotary"]
            q, latent, maps = drawn(b, h, m, d), drawn(b, 1, n, c + r), drawn(h, d - r + e, c) * c**-0.5
            return lambda: mla_attention(q, latent, maps, mask=causal())
        case "delta":
            q, k, v = drawn(b, h, m, d), torch.nn.functional.normalize(drawn(b, g, m, d), dim=-1), drawn(b, h, m, e)
            beta, decay = drawn(b, h, m).sigmoid(), -drawn(b, h, m).exp()
            held = torch.zeros(b, h, d, e)
            return lambda: delta_attention(q, k, v, beta, decay, held, return_state=True)
    return None


def _seconds(call: Callable[[], object]) -> float:
    """The least processor time of a call, over repeats that each last long enough for the clock.

    The limits it is compared with are the best that were seen: disturbance only lowers those, and only raises this.
    """
    with torch.no_grad():
        call()
        start = time.process_time()
        call()
        count = max(1, round(SECONDS / max(1e-6, time.process_time() - start)))
        times = []
        for _ in range(REPEATS):
            start = time.process_time()
            for _ in range(count):
                call()
            times.append((time.process_time() - start) / count)
    return min(times)
