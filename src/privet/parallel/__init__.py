"""Training on several ranks of torch.distributed: what they agree on, how sums are reduced, who draws which noise."""

from privet.parallel.mesh import bare, ranks_for
from privet.parallel.role import Alone, Due, Ranks

__all__ = ["Alone", "Due", "Ranks", "bare", "ranks_for"]
