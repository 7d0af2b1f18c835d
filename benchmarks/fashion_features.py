"""Scattering features of the pictures of Fashion-MNIST: fixed wavelets, nothing learned, so that they cost no privacy.

Two layers of complex Morlet wavelets with a modulus between, averaged over 4 x 4 pixels ("Invariant Scattering
Convolution Networks", Bruna and Mallat 2013). A linear model on them is a strong private model of small pictures
(Tramèr and Boneh, "Differentially Private Learning Needs Better Features", 2021). Each picture's channels are
normalised by that picture alone, in groups, as in the paper's second way: it needs no statistics of the data set.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SCALES, ANGLES, SIDE = 2, 8, 28
PADDED = 40  # pixels of a picture with its border, so that no wavelet meets the opposite edge
GROUPS = 27  # of 81 channels


def _gabor(scale: int, angle: float) -> Tensor:
    """Returns a Morlet wavelet of the scale 2^scale in the Fourier domain, (PADDED, PADDED), real."""
    deviation, frequency, slant = 0.8 * 2.0**scale, 3.0 * math.pi / 4.0 / 2.0**scale, 4.0 / ANGLES
    places = torch.fft.fftfreq(PADDED, d=1.0 / PADDED, dtype=torch.float64)
    y, x = torch.meshgrid(places, places, indexing="ij")
    along, across = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
    window = torch.exp(-(along**2 + (slant * across) ** 2) / (2.0 * deviation**2))
    wave = torch.exp(1j * frequency * along) * window
    wave -= window * (wave.sum() / window.sum())  # without a mean
    norm = slant / (2.0 * math.pi * deviation**2)
    return torch.fft.fft2(norm * wave).real.float()


def _average() -> Tensor:
    """Returns the low pass of the largest scale in the Fourier domain."""
    deviation = 0.8 * 2.0**SCALES
    places = torch.fft.fftfreq(PADDED, d=1.0 / PADDED, dtype=torch.float64)
    window = torch.exp(-(places[:, None] ** 2 + places[None, :] ** 2) / (2.0 * deviation**2))
    return torch.fft.fft2(window / window.sum()).real.float()


def scattering(pictures: Tensor) -> Tensor:  # (N, 28, 28) -> (N, 81, 7, 7)
    """Returns the scattering coefficients of the orders 0, 1 and 2."""
    border = (PADDED - SIDE) // 2
    padded = F.pad(pictures.unsqueeze(1), (border,) * 4, mode="reflect").squeeze(1)
    low = _average()
    wavelets = [(scale, _gabor(scale, math.pi * turn / ANGLES)) for scale in range(SCALES) for turn in range(ANGLES)]

    def smoothed(spectrum: Tensor) -> Tensor:
        whole = torch.fft.ifft2(spectrum * low).real
        step = 2**SCALES
        return whole[:, border : border + SIDE : step, border : border + SIDE : step]

    first = torch.fft.fft2(padded)
    found = [smoothed(first)]
    for scale, wavelet in wavelets:
        modulus = torch.fft.fft2(torch.fft.ifft2(first * wavelet).abs())
        found.append(smoothed(modulus))
        found += [
            smoothed(torch.fft.fft2(torch.fft.ifft2(modulus * again).abs()))
            for later, again in wavelets
            if later > scale
        ]
    return torch.stack(found, dim=1)


def features(pictures: Tensor, *, part: int = 1000) -> Tensor:  # (N, 28, 28) -> (N, 3969)
    """Returns normalised scattering coefficients, computed in parts so that memory stays small."""
    done = [F.group_norm(scattering(each), GROUPS).flatten(1) for each in pictures.split(part)]
    return torch.cat(done)


def shifted(pictures: Tensor, *, most: int = 2, mirror_all: bool = False) -> Tensor:  # (N, 28, 28) -> (N, 28, 28)
    """Returns another view of each picture: shifted by up to `most` pixels, and mirrored by a coin.

    With `mirror_all` every picture is mirrored, and none is shifted.
    """
    rows = torch.arange(len(pictures))[:, None, None]
    down, across = torch.zeros(2, len(pictures), dtype=torch.long), torch.ones(len(pictures), dtype=torch.bool)
    (moved_down, moved_across), mirrored = down, across
    if not mirror_all:
        moved_down, moved_across = torch.randint(-most, most + 1, (2, len(pictures)))
        mirrored = torch.rand(len(pictures)) < 0.5
    padded = F.pad(pictures.unsqueeze(1), (most,) * 4, mode="replicate").squeeze(1)
    places = torch.arange(SIDE) + most
    moved = padded[rows, places[None, :, None] + moved_down[:, None, None], places + moved_across[:, None, None]]
    return torch.where(mirrored[:, None, None], moved.flip(2), moved)
