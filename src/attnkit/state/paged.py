"""Keys and values on pages of a common pool: sequences of any length, forks that share what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from attnkit.native import memory
from attnkit.state.tokens import check_new_tokens
from attnkit.state.view import View


class PagePool:
    """Pages for the keys and values of ``page`` tokens each, and how many owners each page has.

    Parameters
    ----------
    pages: how many there are; nothing is allocated later.
    page: tokens of a page.
    heads, key_size, value_size: KV heads, and channels of each.
    """

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
    ) -> None:
        value_size = key_size if value_size is None else value_size
        if min(pages, page, heads, key_size, value_size) < 1:
            raise ValueError(
                f"PagePool got {pages} pages of {page} tokens, heads {heads} and sizes {key_size} and {value_size}, "
                "expected >= 1 of each"
            )
        # Zeros: a NaN that nobody wrote would still be NaN to a backend that multiplies hidden values by 0.
        self.k = memory.zeros(pages, heads, page, key_size, dtype=dtype, device=device)
        self.v = memory.zeros(pages, heads, page, value_size, dtype=dtype, device=device)
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
        return self.k.nbytes + self.v.nbytes

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
        self.k[other], self.v[other] = self.k[page], self.v[page]
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
    ) -> Self:
        """As many pages as ``budget`` bytes hold: a limit that nothing exceeds, since nothing is allocated later."""
        each = cls(1, page, heads, key_size, value_size, dtype=dtype, device=device).nbytes
        if budget < each:
            raise ValueError(
                f"PagePool.within: the budget is {budget} bytes and one page of {page} tokens takes {each}"
            )
        return cls(budget // each, page, heads, key_size, value_size, dtype=dtype, device=device)

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
        self.k, self.v, self.page, self.keeper = k, v, k.shape[2], None
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
    the state's life.

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
        """Bytes of the pages in the tables; a page that several states share counts for each."""
        pages = {page for table in self._tables for page in table}
        return len(pages) * (self.pool.nbytes // self.pool.k.shape[0])

    def append(self, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> None:
        """Store new tokens, keys ``(b, g, m, d)`` and values ``(b, g, m, e)``.

        ``lengths`` says how many of the ``m`` each sequence takes, from the first on; None takes all. Raises
        ``ValueError``, and stores nothing, when more pages are needed than are free.
        """
        where, pool = "PagedKVState.append", self.pool
        like = {name: x[:1, :, :1].expand(len(self._tables), -1, -1, -1) for name, x in (("k", pool.k), ("v", pool.v))}
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
        for row, count in enumerate(counts):
            self._store(row, k[row, :, :count], v[row, :, :count])
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

    def _store(self, row: int, k: Tensor, v: Tensor) -> None:
        pool, table, taken, m = self.pool, self._tables[row], 0, k.shape[1]
        while taken < m:
            index, slot = divmod(self._lengths[row], pool.page)
            if index == len(table):
                table.append(pool.take())
            elif pool.owners(table[index]) > 1:
                table[index] = pool.copy(table[index])
            count = min(pool.page - slot, m - taken)
            pool.k[table[index], :, slot : slot + count] = k[:, taken : taken + count]
            pool.v[table[index], :, slot : slot + count] = v[:, taken : taken + count]
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
        pool = (self.pool.k, self.pool.v)[which]
        return pool.new_zeros(0, pool.shape[1], 0, pool.shape[3])

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys ``(g, n, d)`` and values ``(g, n, e)`` of one sequence."""
        pages = torch.tensor(self._tables[row], dtype=torch.int64, device=self.pool.k.device)
        length = self._lengths[row]
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length] for x in (self.pool.k, self.pool.v))
        return k, v

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
        return other

    def release(self) -> None:
        """Give all pages back; the sequences are then empty."""
        for table in self._tables:
            while table:
                self.pool.release(table.pop())
        self._lengths = [0] * len(self._lengths)
        self._packed = None
        if self.pool.keeper is not None:
            self.pool.keeper.forget(self)

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        self.pool.check()
        for table, length in zip(self._tables, self._lengths, strict=True):
            assert len(table) == -(-length // self.pool.page)
            assert all(self.pool.owners(page) > 0 for page in table)
