"""Schedules of the noise multiplier, the clip norm and the sampling rate: planned before training, accounted as run."""

from privet.schedules.course import Course, Exponential, Listed, Stepwise
from privet.schedules.driver import Schedule
from privet.schedules.plan import Plan

__all__ = ["Course", "Exponential", "Listed", "Plan", "Schedule", "Stepwise"]
