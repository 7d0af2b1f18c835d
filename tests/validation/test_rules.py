from __future__ import annotations

import pytest
import torch
from torch import nn

from privet.errors import ConfigurationError, PrivetError, UnsupportedModelError
from privet.validation import Issue, is_compatible, require_valid, validate

BATCH_NORMS = [
    nn.BatchNorm1d(4),
    nn.BatchNorm2d(4),
    nn.BatchNorm3d(4),
    nn.SyncBatchNorm(4),
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm2d(4, track_running_stats=False),
    nn.BatchNorm2d(4).requires_grad_(False),
    nn.BatchNorm2d(4, affine=False).requires_grad_(False),
    # Without statistics to fall back on, eval mode reads the batch as well.
    nn.BatchNorm2d(4, track_running_stats=False).eval(),
    nn.BatchNorm2d(4).eval(),
]
OTHERS = [
    nn.InstanceNorm1d(4, track_running_stats=True),
    nn.InstanceNorm2d(4, track_running_stats=True, affine=True),
    nn.InstanceNorm3d(4, track_running_stats=True).eval(),
    nn.Embedding(5, 4, max_norm=1.0),
    nn.Embedding(5, 4, max_norm=1.0).requires_grad_(False),
    nn.Embedding(5, 4, scale_grad_by_freq=True),
    nn.Embedding(5, 4, sparse=True),
    nn.EmbeddingBag(5, 4, max_norm=1.0),
    nn.EmbeddingBag(5, 4, scale_grad_by_freq=True),
    nn.EmbeddingBag(5, 4, sparse=True),
]
FINE = [
    nn.Linear(4, 4),
    nn.GroupNorm(2, 4),
    nn.LayerNorm(4),
    nn.RMSNorm(4),
    nn.InstanceNorm2d(4, affine=True),
    nn.Embedding(5, 4, padding_idx=0),
    nn.EmbeddingBag(5, 4, mode="max"),
    nn.LSTM(4, 4),
    nn.MultiheadAttention(4, 2),
    nn.Conv2d(4, 4, 3, groups=2, padding_mode="circular"),
    nn.Dropout(),
]


@pytest.mark.parametrize("layer", [*BATCH_NORMS, *OTHERS], ids=repr)
def test_what_leaks_is_refused_wherever_it_stands(layer):
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"deep": layer}))
    issues = validate(model)
    assert [issue.path for issue in issues] == ["1.deep"]
    assert issues[0].kind == type(layer).__name__
    assert issues[0].reason
    assert issues[0].replacement
    assert not is_compatible(model)
    with pytest.raises(UnsupportedModelError, match=r"1\.deep \(.*Instead: "):
        require_valid(model)


@pytest.mark.parametrize("layer", FINE, ids=repr)
def test_what_is_safe_passes(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    assert validate(model) == []
    require_valid(model)


def test_a_batch_norm_of_ones_own_is_still_a_batch_norm():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    assert [issue.kind for issue in validate(nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4)))] == ["Activated"]


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_batch_norm_is_refused_for_what_it_is_and_for_having_no_shape():
    issues = validate(nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm2d()))
    assert {"1", "1.weight", "1.bias", "1.running_mean", "1.running_var"} == {issue.path for issue in issues}


def test_every_offender_is_named_at_once_with_its_path():
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Sequential(nn.Embedding(3, 4, max_norm=2, sparse=True))
    )
    issues = validate(model)
    assert [issue.path for issue in issues] == ["0", "2.0", "2.0"]
    with pytest.raises(UnsupportedModelError) as caught:
        require_valid(model)
    message = str(caught.value)
    assert "3 things keep it" in message
    assert message.count("Instead:") == 3
    for words in ("0 (BatchNorm1d)", "2.0 (Embedding)", "max_norm=2 ", "sparse=True"):
        assert words in message


def test_the_refusal_is_a_value_error_and_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        require_valid(model)
    assert isinstance(caught.value, PrivetError)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_with_nothing_to_train():
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        (issue,) = validate(model)
        assert issue.path == ""
        assert "no trainable parameter" in str(issue)


def test_parameters_that_no_rule_can_serve_are_named():
    model = nn.Linear(2, 2)
    model.rotation = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.nowhere = nn.Parameter(torch.ones(2, device="meta"))
    model.sparse = nn.Parameter(torch.eye(2).to_sparse())
    assert {issue.path for issue in validate(model)} == {"rotation", "nowhere", "sparse"}
    for each in (model.rotation, model.nowhere, model.sparse):
        each.requires_grad_(False)
    assert validate(model) == []


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_layer_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    assert {issue.path for issue in validate(model)} == {"0.weight", "0.bias"}
    model(torch.zeros(1, 2))
    assert validate(model) == []


def test_options_that_only_touch_gradients_do_not_matter_for_a_frozen_table():
    table = nn.Embedding(5, 4, sparse=True, scale_grad_by_freq=True).requires_grad_(False)
    assert validate(nn.Sequential(table, nn.Linear(4, 4))) == []


def test_an_observer_of_quantisation_is_refused():
    class ObserverBase(nn.Module):
        pass

    class MinMax(ObserverBase):
        pass

    assert "range" in validate(nn.Sequential(nn.Linear(2, 2), MinMax()))[0].reason


def test_what_is_not_a_module_is_refused():
    with pytest.raises(ConfigurationError, match=r"torch\.nn\.Module, got list"):
        validate([nn.Linear(2, 2)])


def test_an_issue_at_the_root_says_so():
    issue = Issue(path="", kind="BatchNorm1d", reason="it mixes.", replacement="GroupNorm.")
    assert str(issue) == "(the model itself) (BatchNorm1d): it mixes. Instead: GroupNorm."
