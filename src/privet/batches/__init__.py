"""Batches as trees of values, and what becomes of one that does not fit into memory."""

__all__: list[str] = []
