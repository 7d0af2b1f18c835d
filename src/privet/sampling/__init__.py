"""Sampling: how batches are formed, and loaders that form them so."""

from privet.sampling.base import BatchTicket, Partition, Poisson, Sampling
from privet.sampling.loader import PrivateLoader, loader_for, privatize_loader

__all__ = ["BatchTicket", "Partition", "Poisson", "PrivateLoader", "Sampling", "loader_for", "privatize_loader"]
