"""One training step and what surrounds it: whose steps release, what is released, and what is saved."""

__all__: list[str] = []
