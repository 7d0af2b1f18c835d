"""Per-example gradients at Opacus's names, held against examples one by one in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privet.errors import CoverageError, PrivetError
from privet.opacus import GradSampleModule
from privet.opacus.grad_sample import compute_linear_grad_sample, register_grad_sampler
from privet.opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention, SequenceBias
from privet.opacus.utils.per_sample_gradients_utils import (
    check_per_sample_gradients_are_correct,
    compute_grad_samples_microbatch_and_opacus,
)
from privet.opacus.validators import ModuleValidator, register_module_fixer, register_module_validator
from privet.opacus.validators.errors import NotYetSupportedModuleError, UnsupportedModuleError


class First(nn.Module):
    """Returns the first of what a layer returns."""

    def __init__(self, layer, copies=1):
        super().__init__()
        self.layer, self.copies = layer, copies

    def forward(self, x):
        return self.layer(*[x] * self.copies)[0]


CASES = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Tanh()), (5, 2, 6, 6)),
    "lstm": (lambda: First(DPLSTM(3, 4, batch_first=True, bidirectional=True)), (5, 6, 3)),
    "gru": (lambda: First(DPGRU(3, 4, batch_first=True)), (5, 6, 3)),
    "attention": (lambda: First(DPMultiheadAttention(4, 2, batch_first=True), copies=3), (5, 6, 4)),
    "sequence bias": (lambda: SequenceBias(4, batch_first=True), (5, 6, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_module_by_itself_shows_the_gradients_of_its_examples(name):
    torch.manual_seed(1)
    make, shape = CASES[name]
    x = torch.randn(shape, dtype=torch.float64)
    single, batch = compute_grad_samples_microbatch_and_opacus(x, make().double(), loss_reduction="mean")
    assert len(batch) > 0
    for key, rows in batch.items():
        torch.testing.assert_close(rows, single[key], rtol=1e-9, atol=1e-12)
    assert check_per_sample_gradients_are_correct(x, make().double(), grad_sample_mode="functorch")


def test_several_backwards_make_a_list_and_the_wrapped_module_is_ordinary_afterwards():
    model = GradSampleModule(nn.Linear(3, 2))
    for size in (4, 2):
        model(torch.randn(size, 3)).sum(1).mean().backward()
    assert [len(rows) for rows in model._module.weight.grad_sample] == [4, 2]
    total = sum(rows.mean(0) for rows in model._module.weight.grad_sample)
    torch.testing.assert_close(model._module.weight.grad, total)
    model.forbid_grad_accumulation()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        model(torch.randn(4, 3)).sum(1).mean().backward()
    linear = model.to_standard_module()
    linear.zero_grad()
    linear(torch.ones(1, 3)).sum().backward()
    assert not hasattr(linear.weight, "grad_sample")
    torch.testing.assert_close(linear.weight.grad, torch.ones(2, 3))


class Scale(nn.Module):
    """Multiplies each feature by a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x):
        return x * self.weight


def test_a_grad_sampler_of_the_users_own_is_asked_and_held_against_autograd():
    class Wrong(Scale):
        pass

    asked = []

    @register_grad_sampler(Scale)
    def right(layer, activations, backprops):
        asked.append(len(backprops))
        return {layer.weight: activations[0] * backprops}

    @register_grad_sampler([Wrong])
    def wrong(layer, activations, backprops):
        return {layer.weight: activations[0].square() * backprops}

    x = torch.randn(4, 3)
    model = GradSampleModule(Scale())
    model(x).sum(1).mean().backward()
    torch.testing.assert_close(model._module.weight.grad_sample, x)
    assert 4 in asked
    with pytest.raises(PrivetError) as error:
        GradSampleModule(Wrong())(x).sum(1).mean().backward()
    assert isinstance(error.value, CoverageError)


def test_the_samplers_of_opacus_are_there_to_be_called():
    layer, x, gradient = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    rows = compute_linear_grad_sample(layer, [x], gradient)
    torch.testing.assert_close(rows[layer.weight], torch.einsum("bo,bi->boi", gradient, x))
    torch.testing.assert_close(rows[layer.bias], gradient)


def test_validators_and_fixers_of_the_users_own_are_asked():
    class Odd(nn.Linear):
        pass

    @register_module_validator(Odd)
    def validate(module):
        return [NotYetSupportedModuleError("odd")]

    @register_module_fixer([Odd])
    def fix(module, **kwargs):
        return nn.Linear(module.in_features, module.out_features)

    model = nn.Sequential(Odd(2, 2), nn.BatchNorm1d(2))
    assert len(ModuleValidator.validate(model)) == 2
    with pytest.raises(UnsupportedModuleError):
        ModuleValidator.validate(model, strict=True)
    fixed = ModuleValidator.fix_and_validate(model)
    assert [type(part) for part in fixed] == [nn.Linear, nn.GroupNorm]
    assert type(model[0]) is Odd


def test_a_batch_norm_is_refused_where_its_parameters_are_frozen_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    assert not ModuleValidator.is_valid(model)
    assert ModuleValidator.is_valid(ModuleValidator.fix(model))
