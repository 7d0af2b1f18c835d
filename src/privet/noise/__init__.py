"""Noise: the only place that draws it, and the only one where a clipped sum becomes a private gradient."""

from privet.noise.bands import BandChoice, best_bands
from privet.noise.correlated import BLT, BandMF, Correlated, CorrelatedNoise, LambdaCGD, Remembering
from privet.noise.counter import CounterNoise
from privet.noise.cut_tails import cut_tail_delta
from privet.noise.description import Gaussian, Noise
from privet.noise.device import DeviceNoise
from privet.noise.discrete import DiscreteGaussian, DiscreteNoise
from privet.noise.gaussian import GaussianNoise, NoiseMechanism, PrivateGradient
from privet.noise.key import NoiseKey, noise_key
from privet.noise.keystream import Keystream
from privet.noise.optimized import Optimized, optimized_bands, optimized_decay, optimized_decays
from privet.noise.secure import SecureNoise
from privet.noise.several import SeveralReleases
from privet.noise.source import NoiseSource, noise_for
from privet.noise.workload import Participation, Workload, expected_loss

__all__ = [
    "BLT",
    "BandChoice",
    "BandMF",
    "Correlated",
    "CorrelatedNoise",
    "CounterNoise",
    "DeviceNoise",
    "DiscreteGaussian",
    "DiscreteNoise",
    "Gaussian",
    "GaussianNoise",
    "Keystream",
    "LambdaCGD",
    "Noise",
    "NoiseKey",
    "NoiseMechanism",
    "NoiseSource",
    "Optimized",
    "Participation",
    "PrivateGradient",
    "Remembering",
    "SecureNoise",
    "SeveralReleases",
    "Workload",
    "best_bands",
    "cut_tail_delta",
    "expected_loss",
    "noise_for",
    "noise_key",
    "optimized_bands",
    "optimized_decay",
    "optimized_decays",
]
