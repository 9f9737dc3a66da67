"""Continuous batching: many requests share one model, which computes a ragged batch step by step."""
