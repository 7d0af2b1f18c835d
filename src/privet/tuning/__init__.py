"""Tuning that is accounted: a secret, random number of trials, of which only the best is released. Never torch."""

from __future__ import annotations

from privet.tuning.runs import NegativeBinomialRuns, PoissonRuns, Runs
from privet.tuning.select import ScoreFrom, Trial, select
from privet.tuning.trial_ledger import TrialLedger

__all__ = ["NegativeBinomialRuns", "PoissonRuns", "Runs", "ScoreFrom", "Trial", "TrialLedger", "select"]
