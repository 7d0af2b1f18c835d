from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet.errors import UnsupportedModelError
from privet.validation import FixedNorm, get_compatible_module, is_compatible, validate


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 4 * 4, 2)
    )


def test_the_copy_is_compatible_and_runs_and_the_original_is_untouched():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    fixed = get_compatible_module(model)
    assert is_compatible(fixed)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(fixed[1], nn.GroupNorm)
    assert not {id(p) for p in fixed.parameters()} & {id(p) for p in model.parameters()}
    fixed(torch.randn(5, 3, 6, 6)).sum().backward()
    assert all(p.grad is not None for p in fixed.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(6), (3, 6)),
        (nn.BatchNorm1d(6), (3, 6, 5)),
        (nn.BatchNorm2d(64), (3, 64, 2, 2)),
        (nn.BatchNorm2d(64, affine=False), (3, 64, 2, 2)),
        (nn.BatchNorm3d(12), (3, 12, 2, 2, 2)),
        (nn.BatchNorm2d(7), (3, 7, 1, 1)),
        (nn.SyncBatchNorm(8), (3, 8, 2, 2)),
        (nn.InstanceNorm2d(8, track_running_stats=True, affine=True), (3, 8, 2, 2)),
        (nn.BatchNorm2d(8).eval(), (3, 8, 2, 2)),
        (nn.InstanceNorm2d(8, track_running_stats=True).eval(), (3, 8, 2, 2)),
    ],
    ids=repr,
)
def test_no_example_reaches_another_through_the_replacement(norm, shape):
    fixed = get_compatible_module(nn.Sequential(norm, nn.Linear(shape[-1], 2)))[0].train()
    x = torch.randn(shape)
    other = torch.cat([x[:1], torch.randn_like(x[1:])])
    assert torch.allclose(fixed(x)[0], fixed(other)[0], rtol=1e-6, atol=1e-6)
    assert fixed(x)[0].abs().max() > 0.01, "a normalisation over single numbers returns nothing but its bias"


def test_weight_bias_type_mode_and_frozenness_are_kept():
    norm = nn.BatchNorm2d(16, dtype=torch.float64, eps=1e-3)
    nn.init.normal_(norm.weight)
    norm.bias.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 16, 1, dtype=torch.float64), norm)
    fixed = get_compatible_module(model)[1]
    assert torch.equal(fixed.weight, norm.weight)
    assert fixed.weight.dtype == torch.float64
    assert (fixed.weight.requires_grad, fixed.bias.requires_grad) == (True, False)
    assert fixed.eps == 1e-3
    assert fixed.training
    assert fixed.num_groups == 4


def test_a_norm_that_may_meet_flat_input_gets_one_group():
    assert get_compatible_module(nn.BatchNorm1d(64)).num_groups == 1
    assert get_compatible_module(nn.BatchNorm2d(64)).num_groups == 16


def test_a_norm_in_eval_mode_keeps_computing_what_it_computed():
    model = small_net()
    model(torch.randn(50, 3, 6, 6) * 3 + 1)
    model.eval()
    x = torch.randn(4, 3, 6, 6)
    expected = model(x)
    fixed = get_compatible_module(model)
    assert isinstance(fixed[1], FixedNorm)
    for mode in (False, True):
        fixed.train(mode)
        assert torch.allclose(fixed(x), expected, rtol=1e-5, atol=1e-6)
    assert set(fixed.state_dict()) == set(model.state_dict())
    fixed.load_state_dict(model.state_dict())
    assert "affine=True" in repr(fixed[1])


def test_a_fixed_norm_does_not_learn_statistics_from_the_data():
    fixed = get_compatible_module(small_net().eval()).train()
    before = {name: buffer.clone() for name, buffer in fixed.named_buffers()}
    fixed(torch.randn(5, 3, 6, 6) + 7)
    assert all(torch.equal(buffer, before[name]) for name, buffer in fixed.named_buffers())


def test_a_norm_without_statistics_cannot_be_held_fixed():
    with pytest.raises(ValueError, match="no running statistics"):
        FixedNorm(nn.BatchNorm2d(3, track_running_stats=False))


def test_embedding_options_are_dropped():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0, scale_grad_by_freq=True, sparse=True))
    fixed = get_compatible_module(model)
    assert validate(fixed) == []
    assert torch.equal(fixed[0].weight, model[0].weight)
    assert model[0].max_norm == 1.0


def test_a_model_that_is_itself_a_batch_norm_is_replaced():
    assert isinstance(get_compatible_module(nn.BatchNorm2d(8)), nn.GroupNorm)


def test_a_part_used_twice_stays_one_part():
    norm = nn.BatchNorm2d(8)
    fixed = get_compatible_module(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}))
    assert fixed["a"] is fixed["b"][0]
    assert isinstance(fixed["a"], nn.GroupNorm)


def test_tied_parameters_stay_tied():
    first, second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    second.weight = first.weight
    fixed = get_compatible_module(nn.Sequential(first, second))
    assert fixed[0].weight is fixed[1].weight


def test_a_valid_model_comes_back_as_a_copy():
    model = nn.Linear(2, 2)
    fixed = get_compatible_module(model)
    assert fixed is not model
    assert torch.equal(fixed.weight, model.weight)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_what_has_no_replacement_is_named():
    with pytest.raises(UnsupportedModelError, match=r"1\.weight \(Parameter\)"):
        get_compatible_module(nn.Sequential(nn.BatchNorm1d(2), nn.LazyLinear(3)))


class NormThenActivation(nn.BatchNorm2d):
    """A normalisation with an activation of its own, as vision libraries have it."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        reads_batch = self.training or self.running_mean is None
        mean, variance = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, variance, self.weight, self.bias, reads_batch, 0.1, self.eps)
        return self.act(self.drop(x))


class ActivationThenNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x))


class SecretlyShifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


class WithGate(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate


class Renamed(nn.BatchNorm2d):
    """A class of somebody else's that adds nothing to the computation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)
        self.channels = channels


def learned(norm: nn.Module, *shape: int) -> nn.Module:
    """Returns the norm with weights and statistics that are not the first ones."""
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    for _ in range(3):
        norm(torch.randn(5, *shape, dtype=norm.running_mean.dtype) * 2 + 1)
    return norm


EVALUATED = {
    "2d": (nn.BatchNorm2d(6), (6, 3, 4)),
    "1d": (nn.BatchNorm1d(6), (6,)),
    "1d with places": (nn.BatchNorm1d(6), (6, 5)),
    "3d in double": (nn.BatchNorm3d(6, dtype=torch.float64), (6, 2, 2, 3)),
    "without weights": (nn.BatchNorm2d(6, affine=False), (6, 3, 4)),
    "cumulative": (nn.BatchNorm2d(6, momentum=None), (6, 3, 4)),
    "instance": (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (6, 3, 4)),
    "then an activation": (NormThenActivation(6), (6, 3, 4)),
    "then an activation, without weights": (NormThenActivation(6, affine=False), (6, 3, 4)),
    "of another name": (Renamed(6), (6, 3, 4)),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_in_eval_mode_the_replacement_means_the_same_numbers_in_either_mode(name):
    norm, shape = EVALUATED[name]
    norm = learned(copy.deepcopy(norm).to(torch.float64), *shape).eval()
    x = torch.randn(4, *shape, dtype=torch.float64) * 3
    expected = norm(x.clone())
    fixed = get_compatible_module(nn.Sequential(norm, nn.Linear(shape[-1], 2).double()))[0]
    for mode in (False, True):
        assert torch.allclose(fixed.train(mode)(x.clone()), expected, rtol=1e-9, atol=1e-9)
    assert {*fixed.state_dict()} == {*norm.state_dict()}


def test_an_instance_norm_in_eval_mode_takes_one_example_without_a_batch_axis_too():
    norm = learned(nn.InstanceNorm1d(4, track_running_stats=True), 4, 5).eval()
    fixed = get_compatible_module(nn.Sequential(norm, nn.Linear(5, 5)))[0]
    x = torch.randn(4, 5)
    assert torch.allclose(fixed(x), norm(x), atol=1e-6)


def test_an_instance_norm_that_reads_its_input_in_eval_mode_stays_as_it_is():
    norm = learned(nn.InstanceNorm1d(4, track_running_stats=True), 4, 5).eval()
    norm.track_running_stats = False  # torch then normalises by the input, whatever the buffers hold
    fixed = get_compatible_module(nn.Sequential(norm, nn.BatchNorm1d(4)))
    assert type(fixed[0]) is nn.InstanceNorm1d


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_the_activation_of_a_norm_stays_when_groups_take_its_place(options):
    norm = NormThenActivation(8, **options)
    fixed = get_compatible_module(nn.Sequential(norm, nn.Linear(4, 2)))[0]
    x = torch.randn(2, 8, 3, 4)
    expected = F.silu(F.group_norm(x, fixed.num_groups, norm.weight, norm.bias, norm.eps))
    assert torch.allclose(fixed(x), expected, atol=1e-6)
    assert [*fixed._modules] == ["drop", "act"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [ActivationThenNorm, SecretlyShifted, WithGate])
def test_a_class_that_computes_something_else_is_refused_by_name_and_nothing_is_replaced(kind, training):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4), nn.BatchNorm2d(4)).train(training)
    with pytest.raises(UnsupportedModelError, match=rf"1 \({kind.__name__}\).*") as caught:
        get_compatible_module(model)
    assert "nothing was replaced" in str(caught.value)
    assert type(model[1]) is kind


@pytest.mark.parametrize("training", [True, False])
def test_parametrised_norms_are_refused_by_name(training):
    norm = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    with pytest.raises(UnsupportedModelError, match="remove_parametrizations"):
        get_compatible_module(nn.Sequential(norm).train(training))


@pytest.mark.parametrize("training", [True, False])
def test_hooks_stay(training):
    norm, seen = nn.BatchNorm2d(4), []
    norm.register_forward_pre_hook(lambda module, args: seen.append("before"))
    norm.register_forward_hook(lambda module, args, kwargs, output: output + 1, with_kwargs=True)
    norm.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    model = nn.Sequential(norm).train(training)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    fixed = get_compatible_module(model)
    plain = copy.deepcopy(fixed[0])
    plain._forward_hooks.clear()
    seen.clear()
    assert torch.allclose(fixed(x), plain(x.detach()) + 1)
    fixed(x).sum().backward()
    assert seen.count("backward") == 1
    assert seen.count("before") == 3


def test_parts_keep_their_own_mode():
    norm = NormThenActivation(4)
    norm.drop = nn.Dropout(0.5).eval()
    fixed = get_compatible_module(nn.Sequential(norm))[0]
    assert (fixed.training, fixed.drop.training) == (True, False)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_norm_is_named():
    with pytest.raises(UnsupportedModelError, match="run the model once"):
        get_compatible_module(nn.Sequential(nn.LazyBatchNorm2d()))
