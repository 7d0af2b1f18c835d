"""Audits: attempts to refute a privacy claim, by experiments on the training that makes it."""

from privet.audit.intervals import Errors
from privet.audit.mechanism import MechanismAudit, assert_private, audit_mechanism
from privet.audit.membership import LikelihoodRatio, by_class, loss_scores, train_shadows
from privet.audit.one_run import Guesses
from privet.audit.planted import Planted, plant
from privet.audit.roc import Roc
from privet.audit.training import TrainingAudit

__all__ = [
    "Errors",
    "Guesses",
    "LikelihoodRatio",
    "MechanismAudit",
    "Planted",
    "Roc",
    "TrainingAudit",
    "assert_private",
    "audit_mechanism",
    "by_class",
    "loss_scores",
    "plant",
    "train_shadows",
]
