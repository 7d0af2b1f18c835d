"""The examples in a batch, whatever containers hold them: counted, cut, grown, filled up and emptied in one way.

Also the errors which say that memory ran out.
"""

__all__: list[str] = []
