"""One worker's copy of a fragment's global weights, and its local weights beside them.

Between the two is what this worker has learned and nobody has merged. A contribution is the int4
code of that, less what is still under way; taking a merge over moves both by what the owner moved
the global weights by, and takes the merged contributions off the difference. A delta that missed a
merge and the rounding of int4 simply stay in the difference: there is no error feedback to keep.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from r1ray.errors import ExchangeError
from r1ray.exchange.codecs import Codec
from r1ray.exchange.stream_fragments import Fragment
from r1ray.exchange.stream_merge import Broadcast, Contribution

__all__ = ["FragmentCopy"]


@dataclass
class _Shard:
    """A shard of the copy, by its owner.

    Attributes:
        version: of the global weights here.
        sent: (contribution, what it decodes to) of those not merged, as far as is known here.
        arrived: broadcasts not taken over yet, in order of their versions.
    """

    elements: slice
    version: int
    sent: deque[tuple[Contribution, Tensor]] = field(default_factory=deque)
    arrived: deque[Broadcast] = field(default_factory=deque)

    @property
    def numel(self) -> int:
        return int(self.elements.stop - self.elements.start)


class FragmentCopy:
    """Pure bookkeeping and arithmetic; who sends and waits is above it.

    Args:
        rank: of this worker.
        next_version: the first that it contributes to.

    Attributes:
        under_way: the version contributed to and not taken over; one at most.
        num_targets: target tokens that it learned from since the last contribution.
        residual_norm: of what rounding took from the last contribution.
    """

    def __init__(self, fragment: Fragment, codec: Codec, rank: int, next_version: int = 0) -> None:
        self._fragment = fragment
        self._codec = codec
        self._rank = rank
        self.global_E = fragment.read()
        self.num_targets = 0
        self.residual_norm = 0.0
        self._restart(next_version)

    def _restart(self, next_version: int) -> None:
        self.under_way: int | None = None
        self._shards = [_Shard(shard, next_version - 1) for shard in self._fragment.shards]

    def contribute(self, version: int) -> list[Contribution]:
        """What this worker has learned and not sent: one message to every owner."""
        assert self.under_way is None, "one version at a time"
        learned_E = self.global_E - self._fragment.read()
        contributions = []
        for shard in self._shards:
            unsent_E = learned_E[shard.elements]
            for _, sent_E in shard.sent:
                unsent_E.sub_(sent_E)
            code, coded_E = self._codec.encode_with_reconstruction(unsent_E)
            unsent_E.sub_(coded_E)
            contribution = Contribution(self._rank, version, self.num_targets, code)
            shard.sent.append((contribution, coded_E))
            contributions.append(contribution)
        self.residual_norm = float(learned_E.norm())
        self.num_targets = 0
        self.under_way = version
        return contributions

    def receive(self, owner: int, broadcast: Broadcast) -> None:
        """Keep a broadcast until it is due.

        Raises:
            ExchangeError: the owner has left a version out.
        """
        shard = self._shards[owner]
        newest = shard.arrived[-1].version if shard.arrived else shard.version
        if broadcast.version != newest + 1:
            raise ExchangeError(
                f"rank {owner} broadcast version {broadcast.version} after {newest}; do all "
                "workers run the same configuration?"
            )
        shard.arrived.append(broadcast)

    def lacking(self) -> list[int]:
        """Owners whose broadcast of the version under way has not arrived."""
        return [
            owner
            for owner, shard in enumerate(self._shards)
            if self.under_way is not None and shard.version + len(shard.arrived) < self.under_way
        ]

    def take_over(self) -> None:
        """Apply what has arrived up to the version under way, which may then be over."""
        if self.under_way is None:
            return
        change_E = torch.zeros_like(self.global_E)
        for shard in self._shards:
            while shard.arrived and shard.version < self.under_way:
                broadcast = shard.arrived.popleft()
                shard.version = broadcast.version
                moved_E = self._codec.decode(broadcast.code, shard.numel)
                self.global_E[shard.elements] += moved_E
                change_E[shard.elements] += moved_E
                newest_merged = shard.version - (not broadcast.merged[self._rank])
                while shard.sent and shard.sent[0][0].version <= newest_merged:
                    change_E[shard.elements] += shard.sent.popleft()[1]
        self._fragment.add_(change_E)
        if not self.lacking():
            self.under_way = None

    def adopt_global(self) -> None:
        """Replace the local weights by the global ones: what was not merged is forgotten."""
        self._fragment.write(self.global_E)

    def state_dict(self) -> dict[str, Any]:
        """This worker's part; of the global weights the shard it owns.

        Contributions that missed their merge count as not sent.
        """
        assert self.under_way is None, "flush comes first"
        late = {item.version: item.num_targets for shard in self._shards for item, _ in shard.sent}
        return {
            "local": self._fragment.read(),
            "global": self.global_E[self._shards[self._rank].elements].clone(),
            "num_targets": self.num_targets + sum(late.values()),
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]], next_version: int) -> None:
        """Continue from the parts of all workers.

        Raises:
            ExchangeError: they are of other fragments.
        """
        global_E = torch.cat([state["global"] for state in states])
        if len(global_E) != self._fragment.numel:
            raise ExchangeError(
                f"the checkpoint's fragment has {len(global_E)} weights, not "
                f"{self._fragment.numel}; resume with the num_fragments that it was saved with"
            )
        self.global_E = global_E
        self._restart(next_version)
        if len(states) == len(self._shards):
            self._fragment.write(states[self._rank]["local"])
            self.num_targets = states[self._rank]["num_targets"]
        else:
            self.adopt_global()
            self.num_targets = 0
