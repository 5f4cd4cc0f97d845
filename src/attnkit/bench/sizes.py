"""What is measured: the sizes and floors of ``sizes.toml`` as records."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from attnkit.masks import Mask, block_sparse
from attnkit.masks.text import parse
from attnkit.registry import get
from attnkit.spec import Cost, Mechanism, Sizes

SIZES = Path(__file__).with_name("sizes.toml")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Matrix products of a backward over those of the forward, the forward's own included: softmax attention has 2 and then
# 5, a recurrence has twice as many as its forward.
BACKWARD = {"softmax": 3.5, "mla": 3.5}
# Operations a second of ours and a peer together, for progress bars alone: two cores of a Zen 4. A peer may be ours.
PACE = {"sdpa": 9e10, "absorbed": 9e10, "chunk": 1.2e10, "cpu": 2e11}

Limit = Literal["fma", "dot", "bytes", "read"]
Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Floors:
    """What a row has to reach; None is not judged.

    ``ratio`` is at least the peer's time over ours. ``most`` is at most our time over the part of the peer's that the
    work is of its work. ``share`` is at least the part of the machine's limit. ``exponent`` is how far from 1 the power
    of the length may be that times grow with.
    """

    ratio: float | None = None
    most: float | None = None
    share: float | None = None
    exponent: float | None = None


@dataclass(frozen=True)
class Way:
    """One way to do the work of a case: by which backend, and what is changed of the call.

    ``state`` reads keys from a decoding state of that kind, see ``attnkit.bench.states``. ``name`` is for tables.
    """

    name: str = "attnkit"
    backend: str = "cpu"
    mechanism: str | None = None
    mask: str | None = None
    dtype: str | None = None
    state: str | None = None


@dataclass(frozen=True)
class Case:
    """Work to time: whose layer it is, its sizes, how we do it and who else does, the limit it runs into, the floors.

    ``title`` names the work where its kind does not say it. ``inputs`` is how its arguments are drawn, see
    ``attnkit.bench.calls``; ``options`` are keywords of the mechanism that the sizes set.
    """

    id: str
    suite: str
    mechanism: str
    model: str
    sizes: Sizes
    dtype: str
    mask: str | None
    limit: Limit
    floors: Floors
    quick: bool
    ours: Way = Way()
    peer: Way | None = field(default_factory=lambda: Way("SDPA", "sdpa"))
    title: str = ""
    inputs: str = "sample"
    seed: int = 0
    backward: bool = False
    options: Options = ()

    @property
    def spec(self) -> Mechanism:
        return get(self.mechanism)

    @property
    def decodes(self) -> bool:
        return self.sizes.m == 1

    @property
    def long(self) -> bool:
        """Whether its length matters to what it computes, as that of a window or of a choice of keys does."""
        return bool(self.options) or self.mask not in (None, "causal()")

    @property
    def work(self) -> str:
        """The call in a few words, its length last: ``prefill causal fp32 h32/8 d128 n2048``."""
        s = self.sizes
        shape = "full" if self.mask is None else self.mask.replace("()", "")
        kind = "decode" if self.decodes else f"{'train' if self.backward else 'prefill'} {shape}"
        words = [
            self.title or kind,
            SHORT[self.dtype],
            f"b{s.b}" if s.b > 1 else "",
            f"h{s.h}" if s.h == s.g else f"h{s.h}/{s.g}",
            f"d{s.d}" if s.d == s.e else f"d{s.d}/{s.e}",
            f"m{s.m}" if 1 < s.m < s.n else "",
            f"n{s.n}",
        ]
        return " ".join(word for word in words if word)

    @property
    def expected_seconds(self) -> float:
        """How long measuring takes, for progress bars: eight rounds, mostly the peer's."""
        if self.limit == "read":
            return 1.5 + 8 * self.cost().bytes / 1e9
        flops = max(self.cost().flops, self.peer_cost().flops) * self.flops_factor
        return 1.0 + 8 * flops / PACE[self.peer.backend if self.peer else self.ours.backend]

    @property
    def flops_factor(self) -> float:
        """What the backward multiplies the forward's operations with."""
        return BACKWARD.get(self.mechanism, 3.0) if self.backward else 1.0

    def cost(self) -> Cost:
        """What our way has to compute and read."""
        return _cost(self.mechanism, self.sizes, self.dtype, self.mask, self.options)

    def peer_cost(self) -> Cost:
        """The same of the peer; our own without a peer."""
        if self.peer is None:
            return self.cost()
        options = () if self.peer.mechanism else self.options
        return _cost(
            self.peer.mechanism or self.mechanism, self.sizes, self.dtype, self.peer.mask or self.mask, options
        )

    @property
    def part(self) -> float:
        """How much of the peer's work this work is where ``most`` judges it: the share of its visible pairs."""
        judged = self.floors.most is not None and self.peer is not None and self.peer.mask is not None
        return self.cost().flops / self.peer_cost().flops if judged else 1.0

    def visible(self, mask: str | None) -> Mask | None:
        """The mask written as text, at this case's length."""
        return _mask(mask, self.sizes.n)

    def at(self, sizes: Sizes) -> Case:
        """The same work at other sizes."""
        return replace(self, sizes=sizes)


@cache
def _blocks(n: int, block: int, density: float) -> Mask:
    """Blocks drawn with one probability, the same at every call: no structure that a kernel could be lucky with."""
    blocks = -(-n // block)
    generator = torch.Generator().manual_seed(0)
    return block_sparse(torch.rand(blocks, blocks, generator=generator) < density, block)


def _mask(text: str | None, n: int) -> Mask | None:
    if text is None:
        return None
    name, _, percent = text.partition(" of ")
    if not percent:
        return parse(text)
    return _blocks(n, int(name.removeprefix("blocks")), float(percent.removesuffix("%")) / 100)


@cache  # counting the pairs of a mask takes a moment
def _cost(mechanism: str, sizes: Sizes, dtype: str, mask: str | None, options: Options) -> Cost:
    cost = get(mechanism).cost
    known = {"mask": _mask(mask, sizes.n), "itemsize": getattr(torch, dtype).itemsize} | dict(options)
    return cost(sizes, **{name: known[name] for name in inspect.signature(cost).parameters if name in known})


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of ``sizes.toml``, in its order."""
    with SIZES.open("rb") as file:
        table = tomllib.load(file)
    return tuple(
        _case(work, size)
        for work in table["work"]
        for size in table[work["sizes"]]
        if size["n"] in work.get("n", [size["n"]])
    )


def _case(work: Mapping[str, Any], size: Mapping[str, Any]) -> Case:
    n, h, d = size["n"], size["h"], size["d"]
    floors = dict(work.get("floors", {}))
    judged = floors.pop("share_n", [n])
    timed = n in work.get("peer_n", [n]) and "peer" in work
    return Case(
        id=work["id"],
        suite=work["suite"],
        mechanism=work["mechanism"],
        model=size["model"],
        sizes=Sizes(size.get("b", 1), h, size.get("g", h), size.get("m", n), n, d, size.get("e", d)),
        dtype=work["dtype"],
        mask=size.get("mask"),
        limit=work["limit"],
        floors=replace(
            Floors(**floors),
            share=floors.get("share") if n in judged else None,
            ratio=floors.get("ratio") if timed else None,
            most=floors.get("most") if timed else None,
        ),
        quick=size.get("quick", False) and work.get("quick", True),
        ours=Way(state=work.get("state")),
        peer=Way(**work["peer"]) if timed else None,
        title=work.get("title", ""),
        inputs=work.get("inputs", "sample"),
        seed=work.get("seed", 0),
        backward=work.get("backward", False),
        options=tuple(work.get("options", {}).items()),
    )


def suites() -> tuple[str, ...]:
    """The names of the suites, in their order."""
    return tuple(dict.fromkeys(case.suite for case in all_cases()))


def cases(ids: Sequence[str] = (), quick: bool = False, suite: Sequence[str] = ()) -> tuple[Case, ...]:
    """The cases of the figures named, such as ``("K1", "K5")``, or of suites; all when none is named.

    ``quick`` keeps a few of each.
    """
    known = tuple(dict.fromkeys(case.id for case in all_cases()))
    for what, names, there in (("figure", ids, known), ("suite", suite, suites())):
        for name in names:
            if name not in there:
                raise ValueError(f"there is no {what} {name!r}: name some of {', '.join(there)}")
    return tuple(
        case
        for case in all_cases()
        if case.id in (ids or known) and case.suite in (suite or suites()) and (case.quick or not quick)
    )
