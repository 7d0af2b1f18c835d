"""Noise: the only place that draws it, and the only one where a clipped sum becomes a private gradient."""

from privet.noise.correlated import BLT, BandMF, Correlated, CorrelatedNoise, LambdaCGD, Remembering
from privet.noise.counter import CounterNoise
from privet.noise.cut_tails import cut_tail_delta
from privet.noise.description import Gaussian, Noise
from privet.noise.device import DeviceNoise
from privet.noise.gaussian import GaussianNoise, NoiseMechanism, PrivateGradient
from privet.noise.key import NoiseKey, noise_key
from privet.noise.keystream import Keystream
from privet.noise.secure import SecureNoise
from privet.noise.source import NoiseSource, noise_for

__all__ = [
    "BLT",
    "BandMF",
    "Correlated",
    "CorrelatedNoise",
    "CounterNoise",
    "DeviceNoise",
    "Gaussian",
    "GaussianNoise",
    "Keystream",
    "LambdaCGD",
    "Noise",
    "NoiseKey",
    "NoiseMechanism",
    "NoiseSource",
    "PrivateGradient",
    "Remembering",
    "SecureNoise",
    "cut_tail_delta",
    "noise_for",
    "noise_key",
]
