"""Working memory of agents: the state of a session, shared by processes, with a time to live.

docs/semantic.md shows it, beside the semantic cache that agents use as well.
"""

from respkv.agents.aio import AsyncWorkingMemory
from respkv.agents.sync import WorkingMemory

__all__ = ["AsyncWorkingMemory", "WorkingMemory"]
