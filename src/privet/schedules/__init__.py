"""Schedules of the noise multiplier, the clip norm and the sampling rate: planned before training, accounted as run."""

from privet.schedules.course import Course, Exponential, Lambda, Listed, Stepwise
from privet.schedules.driver import (
    ExponentialBatchSize,
    ExponentialGradClip,
    ExponentialNoise,
    LambdaBatchSize,
    LambdaGradClip,
    LambdaNoise,
    ListBatchSize,
    ListGradClip,
    ListNoise,
    Schedule,
    StepBatchSize,
    StepGradClip,
    StepNoise,
)
from privet.schedules.plan import Plan

__all__ = [
    "Course",
    "Exponential",
    "ExponentialBatchSize",
    "ExponentialGradClip",
    "ExponentialNoise",
    "Lambda",
    "LambdaBatchSize",
    "LambdaGradClip",
    "LambdaNoise",
    "ListBatchSize",
    "ListGradClip",
    "ListNoise",
    "Listed",
    "Plan",
    "Schedule",
    "StepBatchSize",
    "StepGradClip",
    "StepNoise",
    "Stepwise",
]
