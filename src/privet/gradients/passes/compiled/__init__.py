"""The clipped sum as one static graph, for fixed shapes."""

from privet.gradients.passes.compiled.step_graph import CompiledSum

__all__ = ["CompiledSum"]
