"""Prefixes that outlive their sequences: pages of keys and values found again by what was fed to make them.

Causal attention makes the keys and values of a token from that token and those before it. So a page is known by a key

    root = SHA-256(model, adapter, mechanism, form of the cache, page size, salt)
    key  = SHA-256(key of the page before it, or root | the tokens on the page)

and a prompt that begins alike shares the pages of whoever came first. A key is only where to look: the tokens of every
page on the way are compared as well, so that two prompts whose keys collide never see each other's pages. Requests with
different salts share nothing, and cannot learn from the time of an answer what others have asked (CVE-2025-46570).

Pages that only prefixes hold are given up, least recently used and longest first, when a state needs them: a call that
would fail even then fails at once and costs no prefix.

Source: PagedAttention, arXiv 2309.06180; automatic prefix caching of vLLM; RadixAttention, arXiv 2312.07104.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from attnkit.state.codec import GROUP
from attnkit.state.paged import PagedKVState, PagePool


class PoolBusyError(ValueError):
    """There are not enough pages now, but there will be when states that run now have ended."""


@dataclass(eq=False)
class _Entry:
    """One page of a prefix, in every layer. Without a parent it is a root: ``label`` says of what, and it has none."""

    key: bytes
    parent: _Entry | None = None
    tokens: tuple[int, ...] = ()
    pages: tuple[int, ...] = ()
    label: str = ""
    children: list[_Entry] = field(default_factory=list)


class PrefixCache:
    """What was computed for the beginnings of earlier sequences, on the pages of the pools of a model's layers.

    Parameters
    ----------
    pools: one a layer, in order, all of one page size; several layers may have the same. One pool for one layer.
    model: what tells this model from any other, such as a digest of its weights.
    mechanism: what made the keys and values.

    Examples
    --------
    ``states = prefixes.open([prompt], most=[len(prompt) + 100])``, feed ``prompt[states[0].length:]``, decode, then
    ``prefixes.keep([tokens], states)`` and ``release`` the states.
    """

    def __init__(self, pools: PagePool | Sequence[PagePool], *, model: str, mechanism: str = "softmax") -> None:
        self.pools = (pools,) if isinstance(pools, PagePool) else tuple(pools)
        sizes = sorted({pool.page for pool in self.pools})
        if len(sizes) != 1:
            raise ValueError(
                f"PrefixCache got pools with pages of {sizes} tokens, expected one or more of one page size"
            )
        if any(pool.keeper is not None for pool in self.pools):
            raise ValueError("PrefixCache got a pool that has a prefix cache, expected none: use that one")
        self.page = sizes[0]
        # What is shared of a page: keys whose group is not full wait with the sequence that they came from.
        self._whole = GROUP if any(pool.codec == "int4" for pool in self.pools) else 1
        self._model, self._mechanism = model, mechanism
        self._roots: dict[bytes, _Entry] = {}
        # Least recently used first, and each page before the one that it follows: the first has no children.
        self._entries: dict[bytes, _Entry] = {}
        self._promises: WeakKeyDictionary[PagedKVState, tuple[list[int], list[int]]] = WeakKeyDictionary()
        for pool in set(self.pools):
            pool.keeper = self

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that prefixes hold, those that states use as well included."""
        return len(self) * sum(pool.nbytes // len(pool.k) for pool in self.pools)

    def key(self, tokens: Sequence[int], *, salt: str = "", adapter: str = "") -> bytes:
        """The key of the page that holds the last of ``tokens``; the root's key for none."""
        key = _digest(self._label(salt, adapter).encode())
        for start in range(0, len(tokens), self.page):
            key = _page_key(key, tuple(tokens[start : start + self.page]))
        return key

    def match(self, tokens: Sequence[int], *, salt: str = "", adapter: str = "") -> int:
        """How many of ``tokens``, all but the last at most, ``open`` would find."""
        return sum(count for _, count in self._path(_checked("match", tokens), salt, adapter))

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        most: Sequence[int] | None = None,
        salt: str = "",
        adapter: str = "",
    ) -> list[PagedKVState]:
        """States, one a layer, that hold the longest known beginning of each prompt: ``lengths`` says how long.

        The last token of a prompt is never among them, since it is fed to learn what follows. A page found in part is
        shared until somebody writes on it.

        Parameters
        ----------
        prompts: token ids of each sequence.
        most: tokens that each sequence may reach. Pages for them are promised: no append of these states up to there is
            refused, whatever other states do. Forks and what is cropped from shared pages are not covered. None
            promises nothing.
        salt: sequences share with those of the same salt only, such as a tenant's secret.
        adapter: what else makes keys and values differ, such as digests of an adapter or of images in the prompt.

        Raises
        ------
        ValueError: the pool is too small for ``most`` tokens. PoolBusyError, a ValueError: it is at the moment.
        """
        sequences = [_checked("open", prompt) for prompt in prompts]
        if not sequences:
            raise ValueError("PrefixCache.open got no prompts, expected at least one")
        if most is not None:
            self._check_most(sequences, most)
        paths = [self._path(sequence, salt, adapter) for sequence in sequences]
        states = self._begin(paths, most)
        if states is None:
            # A page found in part saves no page, and while it is shared it cannot be given up.
            paths = [[step for step in path if step[1] == self.page] for path in paths]
            states = self._begin(paths, most)
        if states is None and most is None:
            # What is shared here could not be given up any more for those who were promised pages.
            paths = [[] for _ in paths]
            states = [PagedKVState(pool, len(paths)) for pool in self.pools]
        if states is None:
            assert most is not None
            raise PoolBusyError(
                f"PrefixCache.open: {list(most)} tokens take up to {self._worst(most)} pages and {self._available()} "
                f"are neither in use nor promised: wait until a state is released"
            )
        for path in paths:
            self._touch([entry for entry, _ in path])
        return states

    def keep(
        self, tokens: Sequence[Sequence[int]], states: Sequence[PagedKVState], *, salt: str = "", adapter: str = ""
    ) -> None:
        """Remember what ``states`` hold, one a layer, for those who begin with the same ``tokens``.

        ``tokens`` are all that each sequence was fed; ``salt`` and ``adapter`` those that it was opened with. The
        states may go on or be released: a page that is remembered is copied before it is written on.
        """
        sequences = [_checked("keep", sequence) for sequence in tokens]
        if tuple(state.pool for state in states) != self.pools:
            raise ValueError(
                f"PrefixCache.keep got {len(states)} states, expected one on each of {len(self.pools)} pools, in order"
            )
        for state in states:
            if state.lengths != [len(sequence) for sequence in sequences]:
                raise ValueError(
                    f"PrefixCache.keep got {[len(sequence) for sequence in sequences]} tokens and states of "
                    f"{state.lengths}, expected what the states were fed"
                )
        for row, sequence in enumerate(sequences):
            self._keep(row, sequence, states, salt, adapter)

    def clear(self) -> None:
        """Forget every prefix; states that use its pages keep them."""
        for entry in list(self._entries.values()):
            self._drop(entry)

    def room(self, state: PagedKVState, needed: Callable[[], int]) -> int:
        """Pages that ``state`` may take now; prefixes are given up if that makes it ``needed()``, and only then."""
        pool = state.pool
        if not needed():
            return pool.free
        if needed() + self._promised(pool, but=state) > pool.free:
            with self._as_if_dropped(pool) as freed:
                helps = needed() + self._promised(pool, but=state) <= pool.free + freed
            if helps:
                self._give_up(pool, lambda: needed() + self._promised(pool, but=state) > pool.free)
        return max(0, pool.free - self._promised(pool, but=state))

    def forget(self, state: PagedKVState) -> None:
        """Nothing is promised to ``state`` any more."""
        self._promises.pop(state, None)

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        order = {key: i for i, key in enumerate(self._entries)}
        for key, entry in self._entries.items():
            assert entry.parent is not None and entry in entry.parent.children
            assert entry.key == key and 1 <= len(entry.tokens) <= self.page and len(entry.pages) == len(self.pools)
            assert all(pool.owners(page) > 0 for pool, page in zip(self.pools, entry.pages, strict=True))
            assert len(entry.tokens) == self.page or not entry.children
            if entry.parent.parent is not None:
                assert order[key] < order[entry.parent.key]
        roots = {entry.key for entry in self._roots.values() if entry.children}
        assert roots == self._roots.keys()

    def _label(self, salt: str, adapter: str) -> str:
        forms = [[str(pool.k.dtype), str(pool.codec), *pool.k.shape[1:], *pool.v.shape[1:]] for pool in self.pools]
        return json.dumps(["attnkit prefix 1", self._model, adapter, self._mechanism, forms, self.page, salt])

    def _root(self, salt: str, adapter: str) -> _Entry | None:
        """The root that is there or a new one; None where another one has its key."""
        label = self._label(salt, adapter)
        key = _digest(label.encode())
        root = self._roots.get(key) or _Entry(key, label=label)
        return root if root.label == label else None

    def _find(self, parent: _Entry, tokens: tuple[int, ...]) -> _Entry | None:
        entry = self._entries.get(_page_key(parent.key, tokens))
        # The key only says where to look.
        return entry if entry is not None and entry.parent is parent and entry.tokens == tokens else None

    def _path(self, tokens: tuple[int, ...], salt: str, adapter: str) -> list[tuple[_Entry, int]]:
        """Pages that ``tokens`` begin with, and how many tokens of each; less than all of them only of the last."""
        node, limit, used = self._root(salt, adapter), len(tokens) - 1, 0
        path: list[tuple[_Entry, int]] = []
        if node is None:
            return path
        while used + self.page <= limit and (entry := self._find(node, tokens[used : used + self.page])):
            path.append((entry, self.page))
            node, used = entry, used + self.page
        rest = tokens[used : max(limit, 0)]
        alike = [(_common(child.tokens, rest), child) for child in node.children]
        count, best = max(alike, key=lambda pair: pair[0], default=(0, None))
        count -= count % self._whole
        if best is not None and count:
            path.append((best, count))
        return path

    def _begin(self, paths: list[list[tuple[_Entry, int]]], most: Sequence[int] | None) -> list[PagedKVState] | None:
        """States that share the pages of ``paths``; None if there is no room for what they may grow to."""
        states = []
        for layer, pool in enumerate(self.pools):
            state = PagedKVState(pool, len(paths))
            for row, path in enumerate(paths):
                state.adopt(row, [entry.pages[layer] for entry, _ in path], sum(count for _, count in path))
            states.append(state)
        if most is not None:
            for state in states:
                self._promises[state] = list(most), self._outstanding(state, most)
        if self._available() < 0:
            for state in states:
                state.release()
            return None
        return states

    def _available(self) -> int:
        """Pages that one more request could have, prefixes given up."""
        counts = []
        for pool in self.pools:
            with self._as_if_dropped(pool) as freed:
                counts.append(pool.free + freed - self._promised(pool))
        return min(counts)

    def _worst(self, most: Sequence[int]) -> int:
        """Pages of the fullest pool when no page is shared."""
        layers = max(self.pools.count(pool) for pool in self.pools)
        return layers * sum(-(-count // self.page) for count in most)

    def _check_most(self, sequences: list[tuple[int, ...]], most: Sequence[int]) -> None:
        lengths = [len(sequence) for sequence in sequences]
        if len(most) != len(lengths) or any(least > count for least, count in zip(lengths, most, strict=True)):
            raise ValueError(
                f"PrefixCache.open: most is {list(most)} for prompts of {lengths} tokens, expected at least as many"
            )
        needed, pages = self._worst(most), min(len(pool.k) for pool in self.pools)
        if needed > pages:
            raise ValueError(
                f"PrefixCache.open: {list(most)} tokens take {needed} pages of {self.page} and the pool has {pages}: "
                f"ask for less, or make the pool with more pages"
            )

    def _outstanding(self, state: PagedKVState, most: Sequence[int]) -> list[int]:
        """Pages that each sequence may still take to reach ``most`` tokens."""
        result = []
        for row, (count, length) in enumerate(zip(most, state.lengths, strict=True)):
            pages = state.pages(row)
            copies = length % self.page > 0 and length < count and state.pool.owners(pages[-1]) > 1
            result.append(max(0, -(-count // self.page) - len(pages)) + copies)
        return result

    def _promised(self, pool: PagePool, but: PagedKVState | None = None) -> int:
        """Pages of ``pool`` that states other than ``but`` may still take by promise."""
        total = 0
        for state, (most, limits) in self._promises.items():
            if state.pool is pool and state is not but:
                total += sum(map(min, self._outstanding(state, most), limits))
        return total

    @contextmanager
    def _as_if_dropped(self, pool: PagePool) -> Iterator[int]:
        """Count owners as if there were no prefixes; gives the number of pages that would then be free as well."""
        held = [page for entry in self._entries.values() for page in self._pages(entry, pool)]
        for page in held:
            pool._owners[page] -= 1
        try:
            yield sum(pool.owners(page) == 0 for page in set(held))
        finally:
            for page in held:
                pool._owners[page] += 1

    def _pages(self, entry: _Entry, pool: PagePool) -> list[int]:
        return [page for its, page in zip(self.pools, entry.pages, strict=True) if its is pool]

    def _give_up(self, pool: PagePool, short: Callable[[], bool]) -> None:
        """Drop prefixes while ``short()``: those that no state uses first, then those that only cost copies."""
        for used in (False, True):
            for entry in list(self._entries.values()):
                if not short():
                    return
                alone = all(pool.owners(page) == 1 for page in self._pages(entry, pool))
                if not entry.children and (used or alone):
                    self._drop(entry)

    def _keep(self, row: int, tokens: tuple[int, ...], states: Sequence[PagedKVState], salt: str, adapter: str) -> None:
        node, path = self._root(salt, adapter), []
        if node is None or not tokens:
            return
        tables = [state.pages(row) for state in states]
        for index, start in enumerate(range(0, len(tokens), self.page)):
            chunk = tokens[start : start + self.page]
            entry = self._find(node, chunk)
            if entry is None:
                key = _page_key(node.key, chunk)
                if key in self._entries or any(child.tokens[: len(chunk)] == chunk for child in node.children):
                    break  # a collision, or a page that begins with all of this one
                for child in [child for child in node.children if child.tokens == chunk[: len(child.tokens)]]:
                    self._drop(child)
                pages = tuple(pool.share(table[index]) for pool, table in zip(self.pools, tables, strict=True))
                entry = _Entry(key, node, chunk, pages)
                self._entries[key] = entry
                node.children.append(entry)
                root = node if node.parent is None else None
                if root is not None:
                    self._roots[root.key] = root
            path.append(entry)
            node = entry
        self._touch(path)

    def _touch(self, path: list[_Entry]) -> None:
        for entry in reversed(path):
            self._entries[entry.key] = self._entries.pop(entry.key)

    def _drop(self, entry: _Entry) -> None:
        assert entry.parent is not None and not entry.children
        for pool, page in zip(self.pools, entry.pages, strict=True):
            pool.release(page)
        del self._entries[entry.key]
        entry.parent.children.remove(entry)
        if entry.parent.parent is None and not entry.parent.children:
            del self._roots[entry.parent.key]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _page_key(parent: bytes, tokens: tuple[int, ...]) -> bytes:
    return _digest(parent + struct.pack(f"<{len(tokens)}q", *tokens))


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _checked(where: str, tokens: Sequence[int]) -> tuple[int, ...]:
    result = tuple(tokens)
    if not all(isinstance(token, int) and abs(token) < 1 << 63 for token in result):
        raise TypeError(
            f"PrefixCache.{where}: tokens are {result[:3]}..., expected integers: tensor.tolist() gives them"
        )
    return result
