"""From losses to a clipped sum."""

from privet.gradients import rules
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.routing import rows_of
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.rules.custom import register_rule
from privet.gradients.summation import clipped_sum, per_example_gradients
from privet.gradients.use import Recorded

__all__ = [
    "Capture",
    "ClippedSum",
    "Recorded",
    "clipped_sum",
    "per_example_gradients",
    "register_rule",
    "rows_of",
    "rules",
]
