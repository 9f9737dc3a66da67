"""A semantic cache: what was answered before, found by how near the new question is to the old one.

For RAG and agents: the embedding of a question is the key, the answer (or the retrieved passages,
an image, anything) the payload. Entries are values of a server, so they live in its tiers, survive
its restarts and are shared by all processes that use it. docs/semantic.md says how.
"""

from respkv.semantic.aio import AsyncSemanticCache
from respkv.semantic.answers import Hit, SemanticStats
from respkv.semantic.embeddings import Metric
from respkv.semantic.sync import SemanticCache

__all__ = ["AsyncSemanticCache", "Hit", "Metric", "SemanticCache", "SemanticStats"]
