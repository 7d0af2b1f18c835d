"""privet inside of the training loops of other libraries. Each module imports its own library; none else does."""

__all__: list[str] = []
