"""What does not belong to one part of Opacus alone."""

__all__: list[str] = []
