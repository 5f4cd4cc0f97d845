"""Stub until the native kernel lands."""

from __future__ import annotations

from torch import Tensor

from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    return ("the native kernel is not there yet",)


def forward(**call: object) -> Tensor:
    raise NotImplementedError
