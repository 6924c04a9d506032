"""Where beginnings of prompts went, by the digests of their whole blocks.

Price: 100 bytes or so for each block that is remembered.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

__all__ = ["REMEMBERED", "PrefixMemory"]

Place = TypeVar("Place", bound=Hashable)
REMEMBERED = 1 << 16  # blocks


class PrefixMemory(Generic[Place]):
    """Where beginnings of prompts went.

    Args:
        size: blocks to remember; those not seen for the longest time are forgotten.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._places: OrderedDict[bytes, Place] = OrderedDict()

    def remember(self, digests: Sequence[bytes], place: Place) -> None:
        """A prompt with these blocks went to `place`."""
        for digest in digests:
            self._places[digest] = place
            self._places.move_to_end(digest)
        while len(self._places) > self._size:
            self._places.popitem(last=False)

    def count_known(self, digests: Sequence[bytes]) -> int:
        """Blocks of the longest beginning that went anywhere."""
        for count in range(len(digests), 0, -1):
            if digests[count - 1] in self._places:
                return count
        return 0

    def choose(
        self, digests: Sequence[bytes], loads: Mapping[Place, int], num_places: int
    ) -> Place | None:
        """Where the longest known beginning went, if there is time for it; None for anywhere.

        Args:
            loads: requests at each place that can be chosen.
            num_places: requests that a place answers at the same time.
        """
        for digest in reversed(digests):
            place = self._places.get(digest)
            if place is not None and place in loads:
                is_free = loads[place] < num_places or loads[place] <= min(loads.values())
                return place if is_free else None
        return None
