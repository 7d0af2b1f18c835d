"""Noise on a grid: what is released, how far a neighbor moves it, what is refused, and the attack that it closes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.accounting import DiscreteGaussianEvent
from privet.accounting.discrete import LEAST_SCALE
from privet.errors import ConfigurationError, ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.noise import DiscreteGaussian, DiscreteNoise, Gaussian, NoiseKey, SecureNoise, discrete
from privet.noise.discrete_draw import CHUNK, DiscreteDraw
from privet.noise.source import Piece
from tests.noise.law import refutations

WIDE = torch.float64


def source(seed: int = 3) -> SecureNoise:
    return SecureNoise(NoiseKey.from_generator(torch.Generator().manual_seed(seed)))


def noisy(values: torch.Tensor, *, std: float = 1.3, step: int = 0, name: str = "w", **options) -> torch.Tensor:
    found = values.clone()
    DiscreteNoise(source()).add_many([(name, found)], std=std, step=step, **options)
    return found


def spacing_of(std: float) -> float:
    spacing = 2.0 ** (math.floor(math.log2(std)) - 40)
    assert LEAST_SCALE <= std / spacing < 2 * LEAST_SCALE
    return spacing


@pytest.mark.parametrize("std", [1.0, 1.3, 2.0 - 1e-9, 3e-7, 1e9])
def test_what_is_released_is_on_the_grid_and_has_the_deviation(std):
    values = torch.randn(20_000, dtype=WIDE) * std
    found = noisy(values, std=std)
    steps = found / spacing_of(std)
    assert torch.equal(steps, steps.round())
    assert refutations((found - values).numpy(), std) == []
    assert "variance" in refutations((found - values).numpy(), 1.1 * std)


def test_the_law_on_the_grid_is_never_narrower_than_the_deviation():
    noise = DiscreteNoise(source())
    for std in (1.0, 1.3, 1.0 / 3.0, 7e-9):
        spacing, law = noise._grid(std)
        assert std <= law.scale * spacing < std * (1.0 + 2.0**-39)
        assert law.scale >= LEAST_SCALE


def test_the_mechanism_uses_the_sums_own_sensitivity():
    values = {"a": torch.zeros(20_000), "b": torch.zeros(30, dtype=WIDE)}
    mechanism = DiscreteGaussian(0.7).mechanism(source())
    released = mechanism.release(ClippedSum(values, 3.0), multiplier=0.7, step=4)
    assert refutations(released.values["a"].numpy(), 2.1) == []
    assert "variance" in refutations(released.values["a"].numpy(), 0.7)
    assert released.values["a"].dtype == torch.float32
    with pytest.raises(ProtocolError, match="used already"):
        mechanism.release(ClippedSum({"a": torch.zeros(3)}, 3.0), multiplier=0.7, step=4)


def test_shards_chunks_and_layouts_get_the_same_noise():
    values = torch.randn(3, CHUNK // 2 + 5, dtype=WIDE)
    whole = noisy(values)
    flat = values.view(-1)
    for start, stop in ((0, 7), (7, CHUNK + 9), (CHUNK + 9, flat.numel())):
        assert torch.equal(noisy(flat[start:stop], offsets={"w": start}), whole.view(-1)[start:stop])
    pieces = [Piece(0, 5, 3), Piece(3, 100, 4)]
    found = noisy(torch.cat([flat[5:8], flat[100:104]]), offsets={"w": pieces})
    assert torch.equal(found, torch.cat([whole.view(-1)[5:8], whole.view(-1)[100:104]]))
    turned = values.t().contiguous().t()
    assert not turned.is_contiguous()
    DiscreteNoise(source()).add_many([("w", turned)], std=1.3, step=0)
    assert torch.equal(turned, whole)
    assert noisy(torch.zeros(0)).numel() == 0


def test_other_steps_and_names_and_the_gaussian_source_are_apart():
    zeros = torch.zeros(1000, dtype=WIDE)
    found = [
        noisy(zeros),
        noisy(zeros, step=1),
        noisy(zeros, name="v"),
        source().add_(zeros.clone(), std=1.3, name="w", step=0),
    ]
    for place, one in enumerate(found):
        for other in found[:place]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.2


# -- how far a neighbor moves the rounded sum ----------------------------------------------------------------------


def rounded(values: list[np.ndarray], std: float, monkeypatch) -> list[list[int]]:
    """Returns what is released without noise, in whole steps of the grid."""
    with monkeypatch.context() as patch:
        patch.setattr(discrete, "DiscreteLaw", lambda scale: SimpleNamespace(scale=scale))
        patch.setattr(DiscreteDraw, "values", lambda self, law, count, **at: np.zeros(count, dtype=np.int64))
        found = [noisy(torch.from_numpy(each), std=std) for each in values]
    return [[int(step) for step in (each / spacing_of(std)).tolist()] for each in found]


def moved(one: list[int], other: list[int]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)))  # integers: exact up to the root


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60),
    multiplier=st.floats(2.0**-10, 50.0),
    sensitivity=st.floats(1e-6, 1e6),
    apart=st.floats(0.0, 1.0),
    draw=st.tuples(st.integers(0, 2**32 - 1), st.booleans()),
)
def test_neighbors_are_never_further_apart_than_is_billed(size, multiplier, sensitivity, apart, draw):
    monkeypatch, (seed, halves) = pytest.MonkeyPatch(), draw
    rng = np.random.default_rng(seed)
    std = multiplier * sensitivity
    step = spacing_of(std)
    shift = rng.standard_normal(size)
    shift *= apart * sensitivity / np.linalg.norm(shift)
    first = rng.standard_normal(size) * std
    if halves:  # on both sides of where rounding jumps
        first = (np.round(first / step) + 0.5) * step - shift / 2
    second = first + shift
    one, other = rounded([first, second], std, monkeypatch)
    distance = float(np.linalg.norm(second - first)) / step * (1 + 1e-12)
    assert moved(one, other) <= distance + math.sqrt(size)
    # In units of the noise: what the event is billed for. Sums apart by the whole sensitivity are covered as well.
    scale = math.ceil(std / step)
    assert moved(one, other) / scale <= 1.0 / DiscreteGaussianEvent(multiplier, 0.0).gaussian_multiplier


def test_rounding_can_move_neighbors_apart_as_far_as_is_billed(monkeypatch):
    # Without the term √d the bill would be too small: sums that nearly coincide are √d steps apart.
    size, std = 400, 1.0
    step = spacing_of(std)
    below = np.full(size, 10.5 * step) - 1e-6 * step
    above = np.full(size, 10.5 * step) + 1e-6 * step
    one, other = rounded([below, above], std, monkeypatch)
    assert moved(one, other) == pytest.approx(math.sqrt(size))
    assert np.linalg.norm(above - below) / step < 1e-4


# -- the attack ----------------------------------------------------------------------------------------------------


def tells_a_zero_sum(released: torch.Tensor) -> bool:
    """Returns whether what was released proves that the sum was 0 and not 1.

    1 + n near 0, for a float32 n near -1, is a multiple of 2^-24: nothing finer comes out. 0 + n is as fine as n is
    small (Mironov, 2012; Haney et al., arXiv 2207.13793).
    """
    small = released[released.abs() < 0.125].double() * 2.0**24
    return bool((small != small.round()).any())


@pytest.mark.parametrize("noise", [Gaussian(1.0), DiscreteGaussian(1.0)], ids=["Gaussian", "DiscreteGaussian"])
def test_the_bits_of_a_release_tell_neighbors_apart_but_on_a_grid(noise):
    mechanism = noise.mechanism(source())
    told = {}
    for value in (0.0, 1.0):
        sums = [torch.full((200,), value) for _ in range(20)]
        first = 0 if value == 0.0 else 100
        released = [
            mechanism.release(ClippedSum({"w": each}, 1.0), multiplier=1.0, step=first + at).values["w"]
            for at, each in enumerate(sums)
        ]
        told[value] = sum(map(tells_a_zero_sum, released))
    if isinstance(noise, Gaussian):
        assert told == {0.0: 20, 1.0: 0}  # certain, from each single release
    else:
        assert told == {0.0: 20, 1.0: 20}  # the same bits, whatever the sum


@pytest.mark.parametrize("noise", [Gaussian(1.0), DiscreteGaussian(1.0)], ids=["Gaussian", "DiscreteGaussian"])
def test_the_spacing_of_a_sum_in_double_tells_neighbors_apart_but_on_a_grid(noise):
    # A large sum, and one without it. In units of 2^-45 the second is finer.
    finer = {}
    for value in (0.0, 2.0**10):
        released = noise.mechanism(source()).release(
            ClippedSum({"w": torch.full((1000,), value, dtype=WIDE)}, 2.0**10), multiplier=1.0, step=0
        )
        units = released.values["w"] * 2.0**42
        finer[value] = float((units != units.round()).double().mean())
    if isinstance(noise, Gaussian):
        assert finer[0.0] > 2 * finer[2.0**10] > 0.0
    else:
        assert finer == {0.0: 0.0, 2.0**10: 0.0}


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [0.0, -1.0, 2.0**-11, math.inf, math.nan])
def test_too_little_noise_is_refused(multiplier):
    with pytest.raises(ConfigurationError, match="multiplier"):
        DiscreteGaussian(multiplier)
    with pytest.raises(ConfigurationError, match="multiplier"):
        DiscreteGaussian(1.0).with_multiplier(multiplier)


@pytest.mark.parametrize("sum_error", [-1e-3, math.inf, math.nan, "much"])
def test_an_odd_error_of_the_sum_is_refused(sum_error):
    with pytest.raises(ConfigurationError, match="sum_error"):
        DiscreteGaussian(1.0, sum_error)


@pytest.mark.parametrize("bad", [2.0**21, -(2.0**22), math.inf, math.nan])
def test_a_sum_beyond_the_integers_is_refused_before_anything_is_touched(bad):
    good, wrong = torch.ones(3), torch.tensor([0.0, bad])
    noise = DiscreteNoise(source())
    with pytest.raises(ProtocolError, match=r"grid cannot hold.*Nothing was released") as found:
        noise.add_many([("good", good), ("wrong", wrong)], std=1.0, step=0)
    assert torch.equal(good, torch.ones(3))
    assert str(bad) not in str(found.value)  # the value is secret
    noise.add_many([("good", torch.tensor([2.0**20]))], std=1.0, step=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_other_types_are_refused(dtype):
    with pytest.raises(ConfigurationError, match="float32 or float64"):
        DiscreteNoise(source()).add_many([("w", torch.zeros(2, dtype=dtype))], std=1.0, step=0)


def test_a_grid_without_noise_or_without_room_is_refused():
    noise = DiscreteNoise(source())
    zeros = torch.zeros(2, dtype=WIDE)
    for std, words in ((0.0, "protects nothing"), (1e-300, "no room"), (1e300, "no room"), (math.nan, "no room")):
        with pytest.raises(ConfigurationError, match=words):
            noise.add_many([("w", zeros)], std=std, step=0)
    assert not zeros.any()


def test_names_sources_and_sizes_are_checked(monkeypatch):
    shared = source()
    DiscreteNoise(shared)
    with pytest.raises(ProtocolError, match="already serves"):
        Gaussian(1.0).mechanism(shared)
    with pytest.raises(ProtocolError, match="already serves"):
        DiscreteNoise(shared)
    with pytest.raises(ConfigurationError, match="addressed source"):
        DiscreteNoise(object())
    with pytest.raises(ConfigurationError, match="given twice"):
        DiscreteNoise(source()).add_many([("w", torch.zeros(1)), ("w", torch.zeros(1))], std=1.0, step=0)
    monkeypatch.setattr(discrete, "MOST_VALUES", 3)
    with pytest.raises(ConfigurationError, match="released together"):
        DiscreteNoise(source()).add_many([("w", torch.zeros(4))], std=1.0, step=0)


def test_a_reproducible_source_resumes_and_a_fresh_one_has_another_key():
    first, second = DiscreteNoise(source()), DiscreteNoise(source())
    second.load_state_dict(first.state_dict())
    assert first.secure
    assert first.predictable
    fresh = DiscreteNoise(SecureNoise(NoiseKey.fresh()))
    assert not fresh.predictable
    values = torch.zeros(50, dtype=WIDE)
    fresh.add_many([("w", values)], std=1.0, step=0)
    fresh.load_state_dict(fresh.state_dict())
    again = torch.zeros(50, dtype=WIDE)
    fresh.add_many([("w", again)], std=1.0, step=0)
    assert not torch.equal(values, again)
