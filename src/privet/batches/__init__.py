"""Batches as trees of values, and the errors which say that memory ran out."""

__all__: list[str] = []
