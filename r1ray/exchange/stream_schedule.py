"""When each fragment is merged in streaming, as pure arithmetic that all workers share.

Fragment f is sent after (f+1)·H/F local steps, rounded up, then every H steps: version 0, 1, ... of
it. What the owners make of it is taken over `overlap_steps` later. The phase ends with one more
version of every fragment, which waits for all workers.
"""

from dataclasses import dataclass

__all__ = ["StreamSchedule"]


@dataclass(frozen=True)
class StreamSchedule:
    """Attributes:
    num_steps: local steps of the streaming phase.
    local_steps: H, between two versions of a fragment.
    overlap_steps: from sending a version to taking over its merge.
    outer_decay_share: last part of the phase over which the outer momentum falls to zero.
    """

    num_steps: int
    num_fragments: int
    local_steps: int
    overlap_steps: int
    outer_decay_share: float = 0.2

    def sends(self, step: int) -> list[tuple[int, int]]:
        """The (fragment, version) pairs sent after `step` steps, the final ones left out."""
        return [
            (fragment, (step - self._first(fragment)) // self.local_steps)
            for fragment in range(self.num_fragments)
            if (step - self._first(fragment)) % self.local_steps == 0
            and self._first(fragment) <= step < self.num_steps - self.overlap_steps
        ]

    def next_version(self, fragment: int, step: int) -> int:
        """The first version of a fragment that is sent later than after `step` steps."""
        if step >= self.num_steps:
            return self.final_version(fragment) + 1
        last = min(step, self.num_steps - self.overlap_steps - 1)
        return max(0, (last - self._first(fragment)) // self.local_steps + 1)

    def final_version(self, fragment: int) -> int:
        """The version that ends the phase."""
        return self.next_version(fragment, self.num_steps - 1)

    def sent_at(self, fragment: int, version: int) -> int:
        """Steps done when a version is sent."""
        if version >= self.final_version(fragment):
            return self.num_steps
        return self._first(fragment) + version * self.local_steps

    def momentum_share(self, fragment: int, version: int) -> float:
        """What is left of the outer momentum at a version: 1, and 0 at the end."""
        left = 1 - self.sent_at(fragment, version) / self.num_steps
        return min(1.0, left / self.outer_decay_share)

    def _first(self, fragment: int) -> int:
        return -(-(fragment + 1) * self.local_steps // self.num_fragments)
