"""The only package that may talk to other processes. So far there is one process, whose roles need no talk."""

from privet.gradients.summation import LocalNorms, NormReducer, SumSink

__all__ = ["LocalNorms", "NormReducer", "SumSink"]
