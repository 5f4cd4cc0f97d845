"""Masks written as text, for command lines and files of sizes: ``"causal() & (window(128) | global_tokens(4))"``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable

from attnkit import masks
from attnkit.masks.algebra import Mask

# Masks that are made from numbers alone; the others hold a tensor or a function.
CONSTRUCTORS: dict[str, Callable[..., Mask]] = {
    made.__name__: made
    for made in (
        masks.bigbird,
        masks.causal,
        masks.chunked,
        masks.dilated_window,
        masks.fixed,
        masks.full,
        masks.global_tokens,
        masks.prefix,
        masks.strided,
        masks.symmetric_window,
        masks.window,
    )
}
LONGEST = 200
LARGEST = 1 << 30


def parse(text: str) -> Mask:
    """The mask that ``text`` describes: calls of mask functions with whole numbers, joined by ``&``, ``|`` and ``~``.

    The text is parsed and never run; everything but these few forms is refused with a ``ValueError``.
    """
    if len(text) > LONGEST:
        raise ValueError(f"the mask has {len(text)} characters, expected at most {LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the mask {text!r} cannot be read, expected one such as 'causal() & window(128)'") from error
    return _mask(tree, text)


def _mask(node: ast.expr, text: str) -> Mask:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _mask(left, text) & _mask(right, text)
        case ast.BinOp(left, ast.BitOr(), right):
            return _mask(left, text) | _mask(right, text)
        case ast.UnaryOp(ast.Invert(), operand):
            return ~_mask(operand, text)
        case ast.Call(ast.Name(name), arguments, keywords):
            named = {keyword.arg: _number(keyword.value, text) for keyword in keywords if keyword.arg is not None}
            if len(named) == len(keywords):
                return _call(name, [_number(value, text) for value in arguments], named, text)
    raise ValueError(
        f"the mask {text!r} has {ast.unparse(node)!r}, expected masks such as window(128) joined by & (both), "
        "| (either) and ~ (not)"
    )


def _call(name: str, arguments: list[int | list[int]], named: dict[str, int | list[int]], text: str) -> Mask:
    if name not in CONSTRUCTORS:
        raise ValueError(f"the mask {text!r} names {name!r}, expected one of {', '.join(CONSTRUCTORS)}")
    signature = inspect.signature(CONSTRUCTORS[name])
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        usage = f"{name}({', '.join(signature.parameters)})"
        raise ValueError(f"the mask {text!r} does not give the numbers of {usage}: {error}") from error
    return CONSTRUCTORS[name](*arguments, **named)


def _number(node: ast.expr, text: str) -> int | list[int]:
    match node:
        case ast.Constant(int(value)) if not isinstance(value, bool) and value <= LARGEST:
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value))):
            return -value
        case ast.List(items) | ast.Tuple(items):
            numbers = [number for item in items if isinstance(number := _number(item, text), int)]
            if len(numbers) == len(items):
                return numbers
    raise ValueError(
        f"the mask {text!r} has {ast.unparse(node)!r} for a number, expected a whole number up to {LARGEST}, or a list "
        "of some"
    )
