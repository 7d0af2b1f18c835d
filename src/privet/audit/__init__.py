"""Audits: attempts to refute a privacy claim, by experiments on the training that makes it."""

from privet.audit.intervals import Errors
from privet.audit.mechanism import MechanismAudit, assert_private, audit_mechanism
from privet.audit.one_run import Guesses

__all__ = ["Errors", "Guesses", "MechanismAudit", "assert_private", "audit_mechanism"]
