"""Sampling: how batches are formed, and loaders that form them so."""

from privet.sampling.allocation import RandomAllocation
from privet.sampling.base import BatchTicket, Sampling
from privet.sampling.build import loader_for, privatize_loader
from privet.sampling.cyclic import CyclicPoisson
from privet.sampling.fixed_size import FixedSize
from privet.sampling.loader import PrivateLoader
from privet.sampling.offline import Memberships, draw_schedule, memberships
from privet.sampling.partition import Partition
from privet.sampling.poisson import Poisson
from privet.sampling.reading import ShardedStream
from privet.sampling.schedule import DrawnSchedule
from privet.sampling.shards import ShardedDataset
from privet.sampling.stream import Stream
from privet.sampling.truncated import TruncatedPoisson
from privet.sampling.users import Users

__all__ = [
    "BatchTicket",
    "CyclicPoisson",
    "DrawnSchedule",
    "FixedSize",
    "Memberships",
    "Partition",
    "Poisson",
    "PrivateLoader",
    "RandomAllocation",
    "Sampling",
    "ShardedDataset",
    "ShardedStream",
    "Stream",
    "TruncatedPoisson",
    "Users",
    "draw_schedule",
    "loader_for",
    "memberships",
    "privatize_loader",
]
