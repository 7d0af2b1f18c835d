from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

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
