"""The ways from a batch to its clipped sum: one role, three implementations."""

__all__: list[str] = []
