"""Keys and values on pages of a common pool: sequences of any length, forks that share what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from attnkit.native import memory
from attnkit.state.codec import (
    GROUP,
    Codec,
    GroupedValues,
    KeyGroups,
    PlainRows,
    ScaledRows,
    WaitingKeys,
    checked_codec,
    put_group,
    waiting_ring,
)
from attnkit.state.tokens import check_new_tokens
from attnkit.state.view import Layout, View, layout_of


class PagePool:
    """Pages for the keys and values of ``page`` tokens each, and how many owners each page has.

    Parameters
    ----------
    pages: how many there are; nothing is allocated later.
    page: tokens of a page.
    heads, key_size, value_size: KV heads, and channels of each.
    dtype: of what is appended and read.
    codec: how numbers are kept, as in ``KVState``. The kernel reads codes on pages of a multiple of 32 tokens; int4,
        whose keys are rounded in groups of 32 tokens, takes no others.
    """

    k_rows: PlainRows | ScaledRows | KeyGroups
    v_rows: PlainRows | ScaledRows | GroupedValues

    def __init__(
        self,
        pages: int,
        page: int,
        heads: int,
        key_size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        codec: Codec | None = None,
    ) -> None:
        value_size = key_size if value_size is None else value_size
        if min(pages, page, heads, key_size, value_size) < 1:
            raise ValueError(
                f"PagePool got {pages} pages of {page} tokens, heads {heads} and sizes {key_size} and {value_size}, "
                "expected >= 1 of each"
            )
        self.codec = checked_codec("PagePool", codec)
        # Zeros: a NaN that nobody wrote would still be NaN to a backend that multiplies hidden values by 0.
        if self.codec is None:
            self.k_rows, self.v_rows = (
                PlainRows(memory.zeros(pages, heads, page, size, dtype=dtype, device=device))
                for size in (key_size, value_size)
            )
        elif self.codec != "int4":
            self.k_rows, self.v_rows = (
                ScaledRows(self.codec, pages, heads, page, size, device) for size in (key_size, value_size)
            )
        elif page % GROUP:
            raise ValueError(
                f"PagePool got int4 and pages of {page} tokens, expected a multiple of {GROUP}: keys of {GROUP} tokens "
                f"share their scales, which lie on one page"
            )
        else:
            self.k_rows = KeyGroups(pages, heads, page // GROUP, key_size, device)
            self.v_rows = GroupedValues(pages, heads, page, value_size, device)
        self.like = _like(1, heads, key_size, value_size, dtype, device)
        self.page = page
        self.keeper: Keeper | None = None
        self._free = list(range(pages - 1, -1, -1))
        self._owners = [0] * pages

    @property
    def free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that lies on pages: tensors whose first axis counts these."""
        return [*self.k_rows.tensors.values(), *self.v_rows.tensors.values()]

    @property
    def k(self) -> Tensor:
        """The keys' numbers or codes, ``(pages, heads, page, ...)``."""
        return next(iter(self.k_rows.tensors.values()))

    @property
    def v(self) -> Tensor:
        """The same of values."""
        return next(iter(self.v_rows.tensors.values()))

    def owners(self, page: int) -> int:
        """How many sequences have this page in their table."""
        return self._owners[page]

    def take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def share(self, page: int) -> int:
        self._owners[page] += 1
        return page

    def release(self, page: int) -> None:
        self._owners[page] -= 1
        if self._owners[page] == 0:
            self._free.append(page)

    def copy(self, page: int) -> int:
        """A page of its own for one of the owners of ``page``, with the same content."""
        other = self.take()
        for x in self.tensors:
            x[other] = x[page]
        self.release(page)
        return other

    @classmethod
    def within(
        cls,
        budget: int,
        page: int,
        heads: int,
        key_size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        codec: Codec | None = None,
    ) -> Self:
        """As many pages as ``budget`` bytes hold: a limit that nothing exceeds, since nothing is allocated later."""
        each = cls(1, page, heads, key_size, value_size, dtype=dtype, device=device, codec=codec).nbytes
        if budget < each:
            raise ValueError(
                f"PagePool.within: the budget is {budget} bytes and one page of {page} tokens takes {each}"
            )
        return cls(budget // each, page, heads, key_size, value_size, dtype=dtype, device=device, codec=codec)

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        assert len(set(self._free)) == len(self._free)
        assert [page for page, count in enumerate(self._owners) if count == 0] == sorted(self._free)


class BorrowedPages(PagePool):
    """Pages that somebody else owns, fills and frees: states adopt and read them, and none is ever theirs to write on.

    Parameters
    ----------
    k, v: (pages, heads, page, size), with any strides whose last is 1.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k_rows, self.v_rows, self.codec = PlainRows(k), PlainRows(v), None
        self.like = _like(1, k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device)
        self.page, self.keeper = k.shape[2], None
        self._free: list[int] = []

    def owners(self, page: int) -> int:
        """Two, the state and the true owner: an append would have to copy, for which no page is free."""
        return 2

    def share(self, page: int) -> int:
        return page

    def release(self, page: int) -> None:
        pass

    def check(self) -> None:
        """The bookkeeping is somebody else's."""


class Keeper(Protocol):
    """Who holds pages that it can give up and promises pages to states: asked before a state takes any."""

    def room(self, state: PagedKVState, needed: Callable[[], int]) -> int:
        """Pages that ``state`` may take, after giving up what it takes to make that ``needed()``, if it can be made."""

    def forget(self, state: PagedKVState) -> None:
        """The state has given its pages back."""


class PagedKVState:
    """Keys and values of sequences of any length on pages of a ``PagePool``, which several states may share.

    A fork shares all pages, and a page with several owners is copied before one of them writes on it. An append that
    needs more pages than are free is refused and changes nothing. ``release`` gives the pages back, as does the end of
    the state's life. int4 keys wait beside the pages until their group is full, each sequence's own.

    Parameters
    ----------
    pool: where the pages come from.
    batch: sequences, all empty at first.
    """

    def __init__(self, pool: PagePool, batch: int) -> None:
        if batch < 1:
            raise ValueError(f"PagedKVState got batch {batch}, expected at least 1")
        self.pool = pool
        self._tables: list[list[int]] = [[] for _ in range(batch)]
        self._lengths = [0] * batch
        self._packed: tuple[Tensor, Tensor] | None = None
        self._hold(None)

    def _hold(self, recent: Tensor | None, kept: Sequence[int] = ()) -> None:
        """Take ``recent`` as the keys that wait; None where there are none yet."""
        batch, like = len(self._tables), self.pool.like["k"]
        if self.pool.codec == "int4" and recent is None:
            recent, kept = waiting_ring(batch, like.shape[1], like.shape[3], like.dtype, like.device), [0] * batch
        self._recent = recent
        self._waiting = [WaitingKeys(recent[i : i + 1], kept[i]) for i in range(batch)] if recent is not None else []

    @property
    def layout(self) -> Layout:
        """What it takes."""
        return layout_of(**self.pool.like)._replace(batch=len(self._tables))

    @property
    def rows(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As ``KVState.rows``, on pages; what ``recent`` keys there are is by sequence."""
        keys = self.pool.k_rows.tensors
        return (keys if self._recent is None else {**keys, "recent": self._recent}), self.pool.v_rows.tensors

    def __del__(self) -> None:
        if hasattr(self, "_tables"):
            self.release()

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence holds."""
        return list(self._lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in the tables, and of keys that wait; a page that several states share counts for each."""
        pages = {page for table in self._tables for page in table}
        own = 0 if self._recent is None else self._recent.nbytes
        return len(pages) * (self.pool.nbytes // self.pool.k.shape[0]) + own

    def append(self, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> None:
        """Store new tokens, keys ``(b, g, m, d)`` and values ``(b, g, m, e)``.

        ``lengths`` says how many of the ``m`` each sequence takes, from the first on; None takes all. Raises
        ``ValueError``, and stores nothing, when more pages are needed than are free.
        """
        where, pool = "PagedKVState.append", self.pool
        like = {name: x.expand(len(self._tables), -1, -1, -1) for name, x in pool.like.items()}
        m = check_new_tokens(where, {"k": k, "v": v}, like)
        counts = [m] * len(self._tables) if lengths is None else lengths
        if len(counts) != len(self._tables) or not all(0 <= count <= m for count in counts):
            raise ValueError(
                f"{where}: lengths is {counts}, expected 0 to {m} for each of {len(self._tables)} sequences"
            )
        room = pool.free if pool.keeper is None else pool.keeper.room(self, lambda: self._needed(counts))
        needed = self._needed(counts)
        if needed > room:
            raise ValueError(
                f"{where}: needs {needed} more pages of {pool.page} tokens and {room} are free: release states "
                f"that are done, or make the pool with more pages"
            )
        keys = {} if isinstance(pool.k_rows, KeyGroups) else pool.k_rows.encode(k)
        made = [(pool.k_rows.tensors, keys), (pool.v_rows.tensors, pool.v_rows.encode(v))]
        for row, count in enumerate(counts):
            self._store(row, count, made, k[row : row + 1])
        self._packed = None

    def _needed(self, counts: list[int]) -> int:
        """Pages that an append takes from the pool: new ones, and copies of shared ones that it writes on."""
        page, needed = self.pool.page, 0
        sharers: dict[int, int] = {}
        for table, length, count in zip(self._tables, self._lengths, counts, strict=True):
            if count == 0:
                continue
            needed += -(-(length + count) // page) - len(table)
            if length % page:
                last = table[length // page]
                sharers[last] = sharers.get(last, 0) + 1
        # Whoever writes on a page last may have it, if nobody else holds it.
        return needed + sum(min(writers, self.pool.owners(last) - 1) for last, writers in sharers.items())

    def _store(self, row: int, m: int, made: list[tuple[dict[str, Tensor], dict[str, Tensor]]], k: Tensor) -> None:
        """Put the first ``m`` new tokens of a sequence on its pages: what was ``made`` of all, and groups of keys."""
        pool, table, taken = self.pool, self._tables[row], 0
        while taken < m:
            index, slot = divmod(self._lengths[row], pool.page)
            if index == len(table):
                table.append(pool.take())
            elif pool.owners(table[index]) > 1:
                table[index] = pool.copy(table[index])
            count = min(pool.page - slot, m - taken)
            for tensors, new in made:
                for name, x in new.items():
                    tensors[name][table[index], :, slot : slot + count] = x[row, :, taken : taken + count]
            if isinstance(pool.k_rows, KeyGroups):
                on_page = {name: x[table[index] : table[index] + 1] for name, x in pool.k_rows.tensors.items()}
                for group, numbers in self._waiting[row].take(self._lengths[row], k[:, :, taken : taken + count]):
                    put_group(on_page, group % (pool.page // GROUP), pool.k_rows.encode(numbers))
            self._lengths[row] += count
            taken += count

    def store(self, k: Tensor, v: Tensor) -> None:
        """``append`` of as many tokens to every sequence."""
        self.append(k, v)

    def view(self) -> View:
        """Copies of all keys and values, for sequences of one length; see ``read`` for others."""
        if len(set(self._lengths)) > 1:
            raise ValueError(
                f"PagedKVState.view: the sequences hold {self._lengths} tokens, expected one length: read each alone"
            )
        parts = [self.read(row) for row in range(len(self._tables))]
        k, v = (torch.stack([part[i] for part in parts]) if parts else self._nothing(i) for i in (0, 1))
        return View(k, v, self.length)

    def _nothing(self, which: int) -> Tensor:
        like = self.pool.like["kv"[which]]
        return like.new_zeros(0, like.shape[1], 0, like.shape[3])

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys ``(g, n, d)`` and values ``(g, n, e)`` of one sequence, in the state's dtype."""
        k, v = self.numbers(row)
        dtype = self.pool.like["k"].dtype
        return k.to(dtype), v.to(dtype)

    def numbers(self, row: int) -> tuple[Tensor, Tensor]:
        """The same, what codes mean in float32."""
        pool, length = self.pool, self._lengths[row]
        pages = torch.tensor(self._tables[row], dtype=torch.int64, device=pool.k.device)
        whole = length // GROUP * GROUP if isinstance(pool.k_rows, KeyGroups) else length  # the other keys wait

        def held(tensors: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
            rows = {name: x[pages].transpose(0, 1).flatten(1, 2)[None] for name, x in tensors.items()}
            return {name: x[:, :, : tokens * tensors[name].shape[2] // pool.page] for name, x in rows.items()}

        k = pool.k_rows.decode(held(pool.k_rows.tensors, whole))
        if self._waiting:
            k = torch.cat([k, self._waiting[row].rest(length)], 2)
        return k[0], pool.v_rows.decode(held(pool.v_rows.tensors, length))[0]

    def packed(self) -> tuple[Tensor, Tensor]:
        """Page tables int32 ``(b, pages)``, 0 after the last, and lengths int64 ``(b,)``, for kernels."""
        if self._packed is None:
            most = max((len(table) for table in self._tables), default=0)
            tables = [table + [0] * (most - len(table)) for table in self._tables]
            self._packed = (
                torch.tensor(tables, dtype=torch.int32).reshape(len(tables), most),
                torch.tensor(self._lengths, dtype=torch.int64),
            )
        return self._packed

    def pages(self, row: int) -> list[int]:
        """The pages of one sequence, in order."""
        return list(self._tables[row])

    def adopt(self, row: int, pages: Sequence[int], length: int) -> None:
        """Let the empty sequence ``row`` begin with the first ``length`` tokens on ``pages``, which it then shares."""
        assert not self._tables[row] and len(pages) == -(-length // self.pool.page)
        if self._waiting:
            assert length % GROUP == 0  # what of a group is not full waits with another sequence
            self._waiting[row].kept = length
        self._tables[row], self._lengths[row] = [self.pool.share(page) for page in pages], length
        self._packed = None

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens of every sequence that has more."""
        if not 0 <= length <= self.length:
            raise ValueError(f"PagedKVState.crop: length is {length}, expected 0 to {self.length}, the tokens held")
        self.crop_each([min(length, held) for held in self._lengths])

    def crop_each(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths[i]`` tokens of sequence ``i``."""
        fits = len(lengths) == len(self._lengths)
        if not fits or not all(0 <= new <= old for new, old in zip(lengths, self._lengths, strict=True)):
            raise ValueError(
                f"PagedKVState.crop_each: lengths is {lengths}, expected a number for each sequence from 0 to what it "
                f"holds, {self._lengths}"
            )
        for waiting, old, new in zip(self._waiting, self._lengths, lengths, strict=bool(self._waiting)):
            if why := waiting.refusal(new):
                raise ValueError(f"PagedKVState.crop_each: cannot go back from {old} to {new} tokens: {why}")
        for waiting, new in zip(self._waiting, lengths, strict=bool(self._waiting)):
            waiting.crop(new)
        for table, length in zip(self._tables, lengths, strict=True):
            while len(table) > -(-length // self.pool.page):
                self.pool.release(table.pop())
        self._lengths = list(lengths)
        self._packed = None

    def fork(self) -> Self:
        """A state of the same tokens, which shares all pages; what either appends later the other does not see."""
        return self.select(torch.arange(len(self._tables)))

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` holds the tokens of sequence ``rows[i]`` (beam search, batch changes)."""
        other = object.__new__(type(self))
        other.pool, other._packed = self.pool, None
        picked = rows.tolist()
        other._tables = [[self.pool.share(page) for page in self._tables[row]] for row in picked]
        other._lengths = [self._lengths[row] for row in picked]
        recent = None if self._recent is None else self._recent.index_select(0, rows.to(self._recent.device))
        other._hold(recent, [self._waiting[row].kept for row in picked] if self._waiting else ())
        return other

    def release(self) -> None:
        """Give all pages back; the sequences are then empty."""
        for table in self._tables:
            while table:
                self.pool.release(table.pop())
        self._lengths = [0] * len(self._lengths)
        for waiting in self._waiting:
            waiting.kept = 0
        self._packed = None
        if self.pool.keeper is not None:
            self.pool.keeper.forget(self)

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        self.pool.check()
        for table, length in zip(self._tables, self._lengths, strict=True):
            assert len(table) == -(-length // self.pool.page)
            assert all(self.pool.owners(page) > 0 for page in table)


def _like(batch: int, heads: int, key_size: int, value_size: int, dtype: torch.dtype, device: Any) -> dict[str, Tensor]:
    """Tensors without numbers of their own, of a token's shape."""
    one = torch.empty((), dtype=dtype, device=device)
    return {name: one.expand(batch, heads, 1, size) for name, size in (("k", key_size), ("v", value_size))}
