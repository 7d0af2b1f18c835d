"""Capture: which operations met a parameter, and that none was missed."""

__all__: list[str] = []
