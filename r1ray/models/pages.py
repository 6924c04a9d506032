"""Which pages of a pool of keys and values hold what: numbers alone; tensors are elsewhere.

A page has the keys and values of 64 tokens in all layers. It is free, held by one or several
sequences, or kept: held by none, but known by the tokens that it and all pages before it have, for
sequences that begin like these. What was kept longest gives way where pages are short.

A page is known only once it is full, and only where it was read as a whole block of a prompt: what
is written token by token chooses its attention token by token, and is not quite the same
(`r1ray.models.sparse`).

Price: 32 bytes of digest a page of a prompt, made once a request; everything else is O(1) a page.

Source: hash chains over full blocks, as vLLM's automatic prefix caching has them
(arXiv:2309.06180).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from r1ray.errors import ShapeError
from r1ray.ops.block_selection import BLOCK

__all__ = ["PagePool", "chain_digests", "count_pages"]


def count_pages(tokens: int) -> int:
    """That `tokens` tokens take."""
    return -(-tokens // BLOCK)


def chain_digests(token_ids: Sequence[int]) -> list[bytes]:
    """One for each whole block: of its tokens and all before it."""
    ids = np.asarray(token_ids, dtype=np.int64)
    digests, before = [], b""
    for start in range(0, len(ids) // BLOCK * BLOCK, BLOCK):
        before = hashlib.sha256(before + ids[start : start + BLOCK].tobytes()).digest()
        digests.append(before)
    return digests


class PagePool:
    """Numbers of pages, 0 to `num_pages` - 1.

    Attributes:
        num_kept: pages that no sequence holds, but that may be asked for again.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ShapeError(f"a pool of {num_pages} pages holds nothing; make it larger")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._known: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # longest kept first

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._kept)

    def allocate(self, count: int) -> list[int]:
        """Pages of any content, each with one holder.

        Raises:
            ShapeError: there are fewer.
        """
        if count > self.num_available:
            raise ShapeError(f"{count} pages are asked for, {self.num_available} are available")
        pages = []
        for _ in range(count):
            if not self._free:
                page, _ = self._kept.popitem(last=False)
                self._forget(page)
            else:
                page = self._free.pop()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The pages that are known by the first of `digests`, up to the first that is not; held."""
        pages: list[int] = []
        for digest in digests:
            page = self._known.get(digest)
            if page is None:
                break
            self._kept.pop(page, None)
            self._holders[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, digest: bytes) -> None:
        """Let `page`, which is held and full, be found by `digest`; another page's name stays."""
        assert self._holders[page] > 0, "a page is published by who holds it"
        if digest not in self._known and self._digests[page] is None:
            self._known[digest] = page
            self._digests[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Give up one hold of each; the last of a sequence's pages give way first."""
        for page in reversed(pages):
            assert self._holders[page] > 0, "a page is released once a hold"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._digests[page] is None:
                self._free.append(page)
            else:
                self._kept[page] = None

    def _forget(self, page: int) -> None:
        digest = self._digests[page]
        assert digest is not None, "what is kept is known"
        del self._known[digest]
        self._digests[page] = None
