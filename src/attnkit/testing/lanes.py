"""Every way a mechanism runs on this machine: each backend, and the native one once for each CPU level."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from attnkit import native
from attnkit.spec import Mechanism


@dataclass(frozen=True)
class Lane:
    """One backend of one mechanism, at one CPU level where that matters."""

    mechanism: Mechanism
    backend: str
    level: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.mechanism.name, self.backend, self.level)))

    @contextmanager
    def entered(self, compiled: bool = False) -> Iterator[None]:
        """Run at this lane's level. FlexAttention runs uncompiled, each compilation being 5 to 45 s, unless asked."""
        with ExitStack() as stack:
            if self.level is not None:
                stack.enter_context(native.use_level(self.level))
            if self.backend == "flex" and not compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield


def lanes(spec: Mechanism) -> list[Lane]:
    """All lanes of a mechanism that this machine has, the fastest backend first."""
    found = []
    for backend in spec.backends:
        levels = native.STATUS.levels if backend.name == "cpu" else ()
        found += [Lane(spec, backend.name, level) for level in levels] or [Lane(spec, backend.name)]
    return found
