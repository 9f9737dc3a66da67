"""Continuous batching: many requests share one model, which computes a ragged batch step by step."""

from respkv.errors import require

require("respkv.batching", "torch", "torch")
