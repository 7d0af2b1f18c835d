"""The Gaussian mechanism: the one maker of private gradients, the right standard deviation, each sum and step once."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest
import torch

import privet
from privet.errors import ConfigurationError, ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.noise import GaussianNoise, NoiseKey, PrivateGradient, SecureNoise
from tests.noise.law import refutations

SOURCE = Path(privet.__file__).resolve().parent  # of the package that is tested, installed or not


def mechanism(seed: int | None = None) -> GaussianNoise:
    key = NoiseKey.fresh() if seed is None else NoiseKey.from_generator(torch.Generator().manual_seed(seed))
    return GaussianNoise(SecureNoise(key))


def zeros(sensitivity: float = 1.0, size: int = 4000, dtype=torch.float32) -> ClippedSum:
    return ClippedSum({"w": torch.zeros(size, dtype=dtype), "b": torch.zeros(3, dtype=dtype)}, sensitivity)


@pytest.mark.parametrize(("multiplier", "sensitivity"), [(1.1, 1.0), (0.5, 3.0), (2.0, 1e-6), (1.0, 1e15)])
def test_the_noise_has_multiplier_times_the_sums_own_sensitivity(multiplier, sensitivity):
    gradient = mechanism(seed=1).release(zeros(sensitivity), multiplier=multiplier, step=0)
    values = torch.cat([value.flatten() for value in gradient.values.values()]).numpy()
    std = multiplier * sensitivity
    assert gradient.std == std
    assert refutations(values, std) == []
    assert refutations(values, std * 2 / 3)
    assert refutations(values, std * 3 / 2)


def test_the_noise_is_added_to_the_sum_in_place():
    sums = ClippedSum({"w": torch.full((4000,), 5.0)}, 1.0)
    tensor = sums.values["w"]
    gradient = mechanism(seed=2).release(sums, multiplier=1.0, step=0)
    assert gradient.values["w"] is tensor
    assert refutations(tensor.numpy() - 5.0, 1.0) == []


def test_a_sum_is_released_once():
    noise, sums = mechanism(), zeros()
    noise.release(sums, multiplier=1.0, step=0)
    with pytest.raises(ProtocolError, match="released before"):
        noise.release(sums, multiplier=1.0, step=1)
    with pytest.raises(ProtocolError, match="released before"):
        mechanism().release(sums, multiplier=1.0, step=0)


def test_a_step_is_drawn_once_and_in_order():
    noise = mechanism()
    noise.release(zeros(), multiplier=1.0, step=4)
    for step in (4, 3, 0):
        with pytest.raises(ProtocolError, match="Step"):
            noise.release(zeros(), multiplier=1.0, step=step)
    noise.release(zeros(), multiplier=1.0, step=9)


def test_a_refused_release_keeps_the_sum_and_the_step():
    noise, sums = mechanism(), zeros(float("nan"))
    with pytest.raises(ConfigurationError, match="sensitivity"):
        noise.release(sums, multiplier=1.0, step=0)
    assert not sums.released
    noise.release(zeros(), multiplier=1.0, step=0)


@pytest.mark.parametrize(
    ("multiplier", "sensitivity"),
    [
        (1.0, float("inf")),
        (1.0, float("nan")),
        (1.0, -1.0),
        (0.0, float("nan")),
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (-1.0, 1.0),
        (1e30, 1e30),
        (1.0, 1e-40),  # float32 would round such noise to a few values
        (1e-200, 1e-200),
    ],
)
def test_noise_that_would_be_wrong_is_refused(multiplier, sensitivity):
    sums = zeros(sensitivity)
    with pytest.raises(ConfigurationError):
        mechanism().release(sums, multiplier=multiplier, step=0)
    assert not sums.values["w"].any()


def test_float64_holds_smaller_noise():
    gradient = mechanism(seed=3).release(zeros(1e-40, dtype=torch.float64), multiplier=1.0, step=0)
    assert refutations(gradient.values["w"].numpy(), 1e-40) == []


@pytest.mark.parametrize("sensitivity", [1.0, float("inf"), 0.0])
def test_no_noise_leaves_the_sum_as_it_was(sensitivity):
    odd = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, -2.5])
    kept = odd.clone()
    gradient = mechanism().release(ClippedSum({"w": odd}, sensitivity), multiplier=0.0, step=0)
    assert torch.equal(gradient.values["w"].view(torch.int32), kept.view(torch.int32))
    assert gradient.std == 0.0


def test_two_steps_and_two_parameters_share_no_noise():
    noise = mechanism()
    one = noise.release(ClippedSum({"a": torch.zeros(500), "b": torch.zeros(500)}, 1.0), multiplier=1.0, step=0).values
    two = noise.release(ClippedSum({"a": torch.zeros(500), "b": torch.zeros(500)}, 1.0), multiplier=1.0, step=1).values
    rows = torch.stack([one["a"], one["b"], two["a"], two["b"]])
    assert not (rows[:, None] == rows[None, :])[~torch.eye(4, dtype=torch.bool)].any()


def test_shards_of_a_sum_get_the_noise_of_the_whole():
    whole = mechanism(seed=0).release(ClippedSum({"w": torch.zeros(100)}, 1.0), multiplier=1.0, step=0).values["w"]
    for first, last in ((0, 33), (33, 100)):
        part = ClippedSum({"w": torch.zeros(last - first)}, 1.0)
        gradient = mechanism(seed=0).release(part, multiplier=1.0, step=0, offsets={"w": first})
        assert torch.allclose(gradient.values["w"], whole[first:last], rtol=0, atol=1e-6)


def test_a_copied_mechanism_draws_other_noise_for_the_same_step():
    first = mechanism()
    first.release(zeros(), multiplier=1.0, step=0)
    second = copy.deepcopy(first)
    one, two = (noise.release(zeros(), multiplier=1.0, step=1).values["w"] for noise in (first, second))
    assert not (one == two).any()


def test_a_source_serves_one_mechanism():
    source = SecureNoise(NoiseKey.fresh())
    GaussianNoise(source)
    with pytest.raises(ProtocolError, match="already serves"):
        GaussianNoise(source)


def test_a_resumed_run_draws_other_noise_unless_reproducible():
    first, same, other = mechanism(seed=0), mechanism(seed=0), mechanism()
    first.release(zeros(), multiplier=1.0, step=0)
    state = first.state_dict()
    same.load_state_dict(state)
    expected = first.release(zeros(), multiplier=1.0, step=1).values["w"]
    assert torch.equal(same.release(zeros(), multiplier=1.0, step=1).values["w"], expected)
    with pytest.raises(ProtocolError):
        same.release(zeros(), multiplier=1.0, step=1)

    other.release(zeros(), multiplier=1.0, step=0)
    state = other.state_dict()
    before = other.release(zeros(), multiplier=1.0, step=1).values["w"]
    other.load_state_dict(state)  # back to before step 1, whose gradient the world has seen
    assert not (other.release(zeros(), multiplier=1.0, step=1).values["w"] == before).any()


def test_a_private_gradient_is_made_by_the_mechanism_only():
    with pytest.raises(ProtocolError, match="noise mechanism only"):
        PrivateGradient({"w": torch.zeros(1)}, std=1.0, step=0, seal=object())
    gradient = mechanism().release(zeros(), multiplier=1.0, step=0)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ProtocolError):
            attempt(gradient)
    with pytest.raises(AttributeError):
        gradient.std = 0.0
    with pytest.raises(AttributeError):
        gradient.values = {}


def makers(source: str) -> int:
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [getattr(call, "id", getattr(call, "attr", "")) for call in calls]
    return names.count("PrivateGradient") + source.count("_SEAL")


def test_one_file_makes_private_gradients():
    found = {file.relative_to(SOURCE).as_posix() for file in SOURCE.rglob("*.py") if makers(file.read_text())}
    assert found == {"noise/gaussian.py"}
    assert makers("from privet.noise.gaussian import PrivateGradient\nPrivateGradient({}, std=1, step=0)")
    assert makers("gaussian.PrivateGradient({})")


class Differences:
    """A source with memory: the noise of step t is z(t) - z(t - 1), the earlier one drawn again, never stored."""

    secure = True
    predictable = False

    def __init__(self, source: SecureNoise) -> None:
        self.source = source

    def add_many(self, tensors, *, std, step, offsets=None):
        tensors = list(tensors)
        self.source.add_many(tensors, std=std, step=step, offsets=offsets)
        if step > 0:
            earlier = [(name, torch.zeros_like(tensor)) for name, tensor in tensors]
            self.source.add_many(earlier, std=std, step=step - 1, offsets=offsets)
            for (_, tensor), (_, noise) in zip(tensors, earlier, strict=True):
                tensor.sub_(noise)

    def state_dict(self):
        return self.source.state_dict()

    def load_state_dict(self, state):
        self.source.load_state_dict(state)


def test_a_source_with_memory_over_steps_is_one_more_object():
    noise = GaussianNoise(Differences(SecureNoise(NoiseKey.from_generator(torch.Generator().manual_seed(4)))))
    steps = [noise.release(zeros(dtype=torch.float64), multiplier=1.0, step=t).values["w"] for t in range(9)]
    # The differences telescope: nine steps of noise sum to the noise of one.
    assert refutations(torch.stack(steps).sum(0).numpy(), 1.0) == []
    assert refutations(steps[4].numpy(), 2.0**0.5) == []
