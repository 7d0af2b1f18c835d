"""Correlated noise is C⁻¹ Z of the very rows that an independent source gives, whatever the way to it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from privet import ConfigurationError, ProtocolError
from privet.accounting import Toeplitz
from privet.gradients.clipped_sum import ClippedSum
from privet.noise import BLT, BandMF, Gaussian, LambdaCGD, NoiseKey, SecureNoise
from privet.noise.counter import Piece

SHAPES = {"w": (5, 7), "b": (3,), "odd": (11,)}
NOISES = {
    "identity": BandMF(1.0, (2.0,)),
    "two bands": BandMF(1.0, (1.0, 0.5)),
    "bands": BandMF(1.0, (0.9, 0.9, 0.4, 0.1)),
    "bands drawn again": BandMF(1.0, (0.9, 0.9, 0.4, 0.1), most_bytes=0),
    "decays": BLT(1.0, (0.3, 0.1), (0.5, 0.9)),
    "decays drawn again": BLT(1.0, (0.3, 0.1), (0.5, 0.9), most_bytes=0),
    "lambda": LambdaCGD(1.0, 0.7),
}
each_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES.keys())


def key(seed: int | None = 1) -> NoiseKey:
    return NoiseKey.fresh() if seed is None else NoiseKey.from_generator(torch.Generator().manual_seed(seed))


def zeros(sensitivity: float = 1.0, dtype: torch.dtype = torch.float64) -> ClippedSum:
    return ClippedSum({name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}, sensitivity)


def flat(values) -> torch.Tensor:
    return torch.cat([values[name].double().flatten() for name in SHAPES])


def run(mechanism, steps, *, multiplier=1.0, sensitivity=1.0, dtype=torch.float64) -> torch.Tensor:
    """Returns the noise of each step: shape (steps, elements)."""
    rows = [mechanism.release(zeros(sensitivity, dtype), multiplier=multiplier, step=step).values for step in steps]
    return torch.stack([flat(row) for row in rows])


def independent(steps, seed: int = 1) -> torch.Tensor:
    """Returns Z, by the source that was there before: shape (steps, elements)."""
    return run(Gaussian(1.0).mechanism(SecureNoise(key(seed))), steps)


def dense(matrix: Toeplitz, steps: int) -> torch.Tensor:
    column = torch.tensor(matrix.column(steps)) / matrix.squared_norm**0.5
    found = torch.zeros(steps, steps, dtype=torch.float64)
    for index in range(steps):
        found[index:, index] = column[: steps - index]
    return found


@each_noise
def test_the_noise_is_the_inverse_of_c_times_independent_rows(noise):
    found = run(noise.mechanism(SecureNoise(key())), range(9), multiplier=1.3, sensitivity=2.0)
    wanted = 2.6 * torch.linalg.solve(dense(noise.matrix, 9), independent(range(9)))
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    single = run(noise.mechanism(SecureNoise(key())), range(9), multiplier=1.3, sensitivity=2.0, dtype=torch.float32)
    assert torch.allclose(single, wanted, rtol=1e-4, atol=1e-4)


def test_identity_is_the_gaussian_mechanism():
    found = run(BandMF(1.0, (3.0,)).mechanism(SecureNoise(key())), range(3))
    assert torch.allclose(found, independent(range(3)), rtol=1e-12)


def test_a_clip_norm_that_changes_scales_the_noise_of_its_step_alone():
    mechanism = BandMF(1.0, (1.0, 0.6, 0.2)).mechanism(SecureNoise(key()))
    norms = (1.0, 4.0, 0.5, 2.0)
    found = torch.stack(
        [flat(mechanism.release(zeros(norm), multiplier=1.0, step=t).values) for t, norm in enumerate(norms)]
    )
    unit = run(BandMF(1.0, (1.0, 0.6, 0.2)).mechanism(SecureNoise(key())), range(4))
    assert torch.allclose(found, unit * torch.tensor(norms)[:, None], rtol=1e-12)


@each_noise
@pytest.mark.parametrize("why", ["multiplier", "gap", "asked", "no noise"])
def test_the_correlation_begins_anew(noise, why):
    mechanism = noise.mechanism(SecureNoise(key()))
    run(mechanism, range(4))
    later = {"gap": range(7, 12), "no noise": range(5, 10)}.get(why, range(4, 9))
    if why == "asked":
        mechanism.begin_anew()
    if why == "no noise":
        run(mechanism, [4], multiplier=0.0)
    found = run(mechanism, later, multiplier=2.0 if why == "multiplier" else 1.0)
    wanted = torch.linalg.solve(dense(noise.matrix, 5), independent(later))
    assert torch.allclose(found, wanted * (2.0 if why == "multiplier" else 1.0), rtol=1e-9, atol=1e-9)


@each_noise
def test_shards_of_a_sum_get_the_noise_of_the_whole(noise):
    whole = run(noise.mechanism(SecureNoise(key())), range(6))
    ranks = [noise.mechanism(SecureNoise(key())) for _ in range(2)]
    rows = []
    for step in range(6):
        parts = []
        for mechanism, piece in zip(ranks, (Piece(0, 0, 20), Piece(0, 20, 15)), strict=True):
            sums = ClippedSum({"w": torch.zeros(piece.size, dtype=torch.float64)}, 1.0)
            parts.append(mechanism.release(sums, multiplier=1.0, step=step, offsets={"w": [piece]}).values["w"])
        rows.append(torch.cat(parts))
    assert torch.allclose(torch.stack(rows), whole[:, :35], rtol=1e-12, atol=1e-12)


@each_noise
def test_a_reproducible_run_resumes_bit_equal_and_any_other_anew(noise):
    whole = run(noise.mechanism(SecureNoise(key())), range(8), dtype=torch.float32)
    first = noise.mechanism(SecureNoise(key()))
    run(first, range(5), dtype=torch.float32)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    assert "Tensor" not in repr(state)
    assert "tensor" not in repr(state)
    resumed = noise.mechanism(SecureNoise(key()))
    resumed.load_state_dict(state)
    assert torch.equal(run(resumed, range(5, 8), dtype=torch.float32), whole[5:])
    secret, other = noise.mechanism(SecureNoise(key(None))), noise.mechanism(SecureNoise(key(None)))
    run(secret, range(3))
    other.load_state_dict(secret.state_dict())
    assert other.source.state_dict()["began"] is None
    run(other, [3])
    assert other.source.state_dict()["began"] == 3


def test_a_copy_has_no_buffers_and_another_key():
    mechanism = BandMF(1.0, (1.0, 0.9)).mechanism(SecureNoise(key(None)))
    run(mechanism, range(3))
    assert mechanism.source.buffers == 1
    twin = copy.deepcopy(mechanism)
    assert twin.source.buffers == 0
    run(twin, [3])
    assert twin.source.state_dict()["began"] == 3  # with the old row, two sums would share its noise


def test_an_error_midway_ends_the_correlation(monkeypatch):
    mechanism = BandMF(1.0, (1.0, 0.9, 0.5)).mechanism(SecureNoise(key()))
    run(mechanism, range(3))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_div_", lambda *_: (_ for _ in ()).throw(RuntimeError("midway")))
        with pytest.raises(RuntimeError, match="midway"):
            run(mechanism, [3])
    wanted = torch.linalg.solve(dense(BandMF(1.0, (1.0, 0.9, 0.5)).matrix, 2), independent(range(4, 6)))
    assert torch.allclose(run(mechanism, range(4, 6)), wanted)


def test_a_parameter_that_comes_later_gets_the_noise_it_would_have_had():
    noise = BandMF(1.0, (1.0, 0.9, 0.5))
    whole = run(noise.mechanism(SecureNoise(key())), range(6))
    mechanism = noise.mechanism(SecureNoise(key()))
    for step in range(4):
        sums = ClippedSum({"w": torch.zeros(SHAPES["w"], dtype=torch.float64)}, 1.0)
        mechanism.release(sums, multiplier=1.0, step=step)
    assert torch.equal(run(mechanism, range(4, 6)), whole[4:])


def test_buffers_are_as_many_as_said():
    for noise, count in ((NOISES["bands"], 3), (NOISES["decays"], 2), (NOISES["lambda"], 0)):
        mechanism = noise.mechanism(SecureNoise(key()))
        run(mechanism, range(6))
        assert mechanism.source.buffers == count
    size = 8 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    for limit, count in ((3 * size, 3), (3 * size - 1, 0)):
        mechanism = BandMF(1.0, (0.9, 0.9, 0.4, 0.1), most_bytes=limit).mechanism(SecureNoise(key()))
        run(mechanism, range(2))
        assert mechanism.source.buffers == count


def deviations(values: np.ndarray, covariance: np.ndarray) -> float:
    """Returns the least p-value, times the number of tests, of each entry of a covariance: values are (steps, N)."""
    count = values.shape[1]
    found = values @ values.T / count
    diagonal = np.diag(covariance)
    spread = np.sqrt((np.outer(diagonal, diagonal) + covariance**2) / count)
    return float(2 * stats.norm.sf(np.abs((found - covariance) / spread)).min() * found.size)


@pytest.mark.parametrize("noise", [NOISES["bands"], NOISES["decays"], NOISES["lambda"]], ids=["bands", "decays", "l"])
def test_variance_and_correlation_over_steps_are_those_of_the_inverse(noise):
    steps, size = 6, 40_000
    mechanism = noise.mechanism(SecureNoise(key(None)))
    rows = [
        mechanism.release(ClippedSum({"w": torch.zeros(size)}, 1.0), multiplier=1.5, step=step).values["w"]
        for step in range(steps)
    ]
    values = torch.stack(rows).double().numpy()
    inverse = np.linalg.inv(dense(noise.matrix, steps).numpy())
    assert deviations(values, 2.25 * inverse @ inverse.T) > 1e-6
    for wrong in (np.eye(steps), inverse.T @ inverse, (2 / 3) ** 2 * inverse @ inverse.T):
        assert deviations(values, 2.25 * wrong) < 1e-6


def test_bad_numbers_are_refused():
    for make in (
        lambda: BandMF(1.0, ()),
        lambda: BandMF(1.0, (0.5, 0.6)),
        lambda: BandMF(1.0, (1.0, -0.1)),
        lambda: BandMF(-1.0, (1.0,)),
        lambda: BandMF(1.0, (1.0, float("nan"))),
        lambda: BandMF(1.0, (1.0,), most_bytes=-1),
        lambda: BLT(1.0, (), ()),
        lambda: BLT(1.0, (0.6, 0.6), (0.5, 0.9)),
        lambda: BLT(1.0, (0.1,), (1.0,)),
        lambda: BLT(1.0, (0.1, 0.1), (0.5,)),
        lambda: LambdaCGD(1.0, 0.0),
        lambda: LambdaCGD(1.0, 1.0),
    ):
        with pytest.raises(ConfigurationError):
            make()


def test_a_source_serves_one_mechanism_and_must_be_addressed():
    source = SecureNoise(key())
    NOISES["bands"].mechanism(source)
    with pytest.raises(ProtocolError, match="already serves"):
        Gaussian(1.0).mechanism(source)
    with pytest.raises(ConfigurationError, match="addressed source"):
        NOISES["bands"].mechanism(object())


def test_a_state_of_independent_noise_is_refused():
    saved = Gaussian(1.0).mechanism(SecureNoise(key())).state_dict()
    with pytest.raises(ConfigurationError, match="not correlated"):
        NOISES["bands"].mechanism(SecureNoise(key())).load_state_dict(saved)


@each_noise
def test_a_changed_multiplier_keeps_the_correlation_of_the_description(noise):
    assert noise.with_multiplier(2.0).with_multiplier(1.0) == noise
    assert noise.with_multiplier(2.0).matrix == noise.matrix
