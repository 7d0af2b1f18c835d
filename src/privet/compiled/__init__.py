"""The clipped sum as one static graph, for fixed shapes."""

from privet.compiled.step_graph import CompiledSum

__all__ = ["CompiledSum"]
