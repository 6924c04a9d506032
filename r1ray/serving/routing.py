"""Which replica answers: the one that knows most of the prompt, unless it is busy.

1. Where a request went is remembered by the digests of its prompt's whole blocks, as the replica's
   own pages are (`r1ray.models.pages`).
2. A new request goes where the longest beginning of it went last, while that replica has a place
   free or none has fewer requests; else to the one with the fewest.

Every ingress remembers for itself. Price: a digest for each 64 tokens of a prompt; 100 bytes or so
for each that is remembered.
"""

from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from r1ray.models.pages import chain_digests
from r1ray.models.requests import GenerationRequest
from r1ray.serving.prefixes import REMEMBERED, PrefixMemory

__all__ = ["PrefixRouter"]


class PrefixRouter(FIFOMixin, RequestRouter):
    """Serve's router for the model replicas.

    In the order of arrival: Serve tells requests apart by an id that the several answers to one
    HTTP request share, and would forget all of them but one.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve, with `request_router_kwargs`."""
        self._max_concurrency: int = kwargs["max_concurrency"]
        self._memory: PrefixMemory[ReplicaID] = PrefixMemory(REMEMBERED)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The chosen one, then all: of these Serve takes the one with the fewest requests."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        loads = {key: self.replica_queue_len_cache.get(key) or 0 for key in replicas}
        digests = _digest(pending_request)
        chosen = self._memory.choose(digests, loads, self._max_concurrency) if loads else None
        first = [] if chosen is None else [[replicas[chosen]]]
        return [*first, candidate_replicas]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: ReplicaResult,  # noqa: ARG002
    ) -> None:
        """Called by Serve."""
        self._memory.remember(_digest(pending_request), replica_id)


def _digest(pending_request: PendingRequest) -> list[bytes]:
    arguments: list[Any] = [*pending_request.args, *pending_request.kwargs.values()]
    for argument in arguments:
        if isinstance(argument, GenerationRequest):
            return chain_digests(argument.prompt_ids)
    return []
