"""A request in the hands of the model's thread: its sequence, its reader, and its clock."""

from dataclasses import dataclass

import torch

from respkv.batching.request import Timings
from respkv.batching.sequence import Sequence
from respkv.batching.ticket import Ticket


@dataclass(slots=True, eq=False)
class Job:
    """A request in the hands of the model's thread."""

    sequence: Sequence
    ticket: Ticket
    submitted: float
    generator: torch.Generator | None = None
    admitted: float | None = None
    first_token: float | None = None
    lookup_s: float = 0.0
    saved: int = 0
    local: int = 0

    def timings(self, now: float) -> Timings:
        """Return what it took until now, which is its end."""
        first = self.first_token
        return Timings(
            queue_s=(self.admitted or now) - self.submitted,
            cache_lookup_s=self.lookup_s,
            ttft_s=0.0 if first is None else first - self.submitted,
            decode_s=0.0 if first is None else now - first,
            total_s=now - self.submitted,
            prefix_tokens_saved=self.saved,
            local_tokens=self.local,
            preemptions=self.sequence.preemptions,
        )
