"""What is measured: the sizes and floors of ``sizes.toml`` as records."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from attnkit.masks import Mask
from attnkit.masks.text import parse
from attnkit.registry import get
from attnkit.spec import Cost, Mechanism, Sizes

SIZES = Path(__file__).with_name("sizes.toml")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

Limit = Literal["fma", "dot", "read"]


@dataclass(frozen=True)
class Case:
    """One call to time: whose layer it is, its sizes, the limit of the machine it runs into, and the floors to hold."""

    id: str
    mechanism: str
    model: str
    sizes: Sizes
    dtype: str
    mask: str | None
    limit: Limit
    floor_ratio: float
    floor_share: float | None
    quick: bool

    @property
    def spec(self) -> Mechanism:
        return get(self.mechanism)

    @property
    def decodes(self) -> bool:
        return self.sizes.m < self.sizes.n

    @property
    def work(self) -> str:
        """The call in a few words: ``prefill fp32 causal h32/8 d128 n2048``."""
        s = self.sizes
        shape = "full" if self.mask is None else self.mask.replace("()", "")
        heads = f"h{s.h}" if s.h == s.g else f"h{s.h}/{s.g}"
        kind = "decode" if self.decodes else f"prefill {shape}"
        return f"{kind} {SHORT[self.dtype]} {heads} d{s.d} n{s.n}"

    def arguments(self, sizes: Sizes | None = None) -> dict[str, Any]:
        """Arguments for the mechanism's function, at this case's sizes or at others."""
        made = self.spec.sample(0, sizes or self.sizes, getattr(torch, self.dtype))
        return made | {"mask": self._mask()}

    @property
    def expected_seconds(self) -> float:
        """How long measuring takes, for progress bars: seven rounds on two cores of a Zen 5, mostly torch."""
        cost = self.cost()
        return 1 + max(1.0, 7 * cost.bytes / 1e9 if self.limit == "read" else 7 * cost.flops / 1e11)

    def cost(self) -> Cost:
        known = {"mask": self._mask(), "itemsize": getattr(torch, self.dtype).itemsize}
        cost = self.spec.cost
        return cost(self.sizes, **{name: known[name] for name in inspect.signature(cost).parameters if name in known})

    def _mask(self) -> Mask | None:
        return None if self.mask is None else parse(self.mask)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of ``sizes.toml``, in its order."""
    with SIZES.open("rb") as file:
        table = tomllib.load(file)
    return tuple(_case(work, size) for work in table["work"] for size in table[work["sizes"]])


def _case(work: dict[str, Any], size: dict[str, Any]) -> Case:
    n = size["n"]
    return Case(
        id=work["id"],
        mechanism=work["mechanism"],
        model=size["model"],
        sizes=Sizes(1, size["h"], size["g"], size.get("m", n), n, size["d"], size["d"]),
        dtype=work["dtype"],
        mask=size.get("mask"),
        limit=work["limit"],
        floor_ratio=work["floor_ratio"],
        floor_share=work["floor_share"] if n in work.get("floor_share_n", [n]) else None,
        quick=size.get("quick", False),
    )


def cases(ids: Sequence[str] = (), quick: bool = False) -> tuple[Case, ...]:
    """The cases of the figures named, such as ``("K1", "K5")``, all when none is; ``quick`` keeps a few of each."""
    known = tuple(dict.fromkeys(case.id for case in all_cases()))
    for name in ids:
        if name not in known:
            raise ValueError(f"there is no figure {name!r}: name some of {', '.join(known)}")
    return tuple(case for case in all_cases() if case.id in (ids or known) and (case.quick or not quick))
