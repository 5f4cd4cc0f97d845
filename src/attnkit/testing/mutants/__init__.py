"""Programs that are wrong on purpose, each with one mistake that somebody really made: a suite has to notice them all.

A mutant of the arithmetic is a backend that spoils the call and then runs the definition. A mutant of the bookkeeping
replaces one named function for the length of a ``with`` block. Each mechanism's mutants are in the file of its name.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any
from unittest import mock

from attnkit.spec import Backend, Mechanism

BACKEND = "mutant"


@dataclass(frozen=True)
class Mutant:
    """One mistake. ``planted(spec)`` gives the mechanism with a backend ``mutant`` that makes it."""

    name: str
    mistake: str
    planted: Callable[[Mechanism], AbstractContextManager[Mechanism]]


class Mutants(dict[str, Mutant]):
    """The mutants of one mechanism, by name."""

    def calling(self, name: str, mistake: str, spoil: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Add a mutant that runs the definition on a call in which ``spoil(call)`` replaces arguments."""
        self.running(name, mistake, lambda spec: lambda **call: spec.reference(**{**call, **spoil(call)}))

    def returning(self, name: str, mistake: str, spoil: Callable[[dict[str, Any], Any], Any]) -> None:
        """Add a mutant that returns ``spoil(call, result)`` of what the definition returned."""
        self.running(name, mistake, lambda spec: lambda **call: spoil(call, spec.reference(**call)))

    def running(self, name: str, mistake: str, wrong: Callable[[Mechanism], Callable[..., Any]]) -> None:
        """Add a mutant that runs ``wrong(spec)`` on the checked call."""
        self[name] = Mutant(name, mistake, lambda spec: wrong_backend(spec, wrong(spec)))

    def replacing(
        self,
        name: str,
        mistake: str,
        owner: Any,
        attribute: str,
        wrong: Callable[[Any], Any],
        *,
        preset: str | None = None,
    ) -> None:
        """Add a mutant in which ``owner.attribute`` is ``wrong(the right one)``.

        ``preset`` is the only one that runs it: laws draw layers from all presets, and would seldom draw this one.
        """

        @contextmanager
        def planted(spec: Mechanism) -> Iterator[Mechanism]:
            right = mock.patch.object(owner, attribute, wrong(getattr(owner, attribute)))
            among = dataclasses.replace(spec, presets=(spec.preset(preset),)) if preset else spec
            with right, wrong_backend(among, spec.reference) as planted_spec:
                yield planted_spec

        self[name] = Mutant(name, mistake, planted)


@contextmanager
def wrong_backend(spec: Mechanism, forward: Callable[..., Any]) -> Iterator[Mechanism]:
    """``spec`` with one more backend that runs ``forward``, for its layer as well."""
    wrong = dataclasses.replace(spec, backends=(Backend(BACKEND, lambda: forward), *spec.backends))
    with mock.patch.object(sys.modules[spec.function.__module__], "SPEC", wrong):
        yield wrong


def of(mechanism: str) -> Mutants:
    """The mutants of the mechanism of this name; none when no file here has its name."""
    if mechanism not in {module.name for module in iter_modules(__path__)}:
        return Mutants()
    found = import_module(f"{__name__}.{mechanism}").MUTANTS
    assert isinstance(found, Mutants)
    return found
