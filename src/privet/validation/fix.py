"""Replacements for what `validate` refuses: the same model, with other normalisations and safe options."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from privet.validation.rules import require_valid, validate

__all__ = ["FixedNorm", "get_compatible_module"]

# Group normalisation works best at 32 groups or 16 channels a group (Wu and He 2018, table 3). Below 4 channels a
# group, a group on a 1x1 map would hold too few numbers to normalise.
_MOST_GROUPS = 32
_LEAST_CHANNELS = 4


class FixedNorm(nn.Module):
    """A batch or instance normalisation with its statistics held fixed, in training mode too.

    What it computes is what the original computes in eval mode; the names of its parameters and buffers are the
    original's, so that a `state_dict` of either fits the other. The statistics must not come from the private data.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, original: _NormBase) -> None:
        super().__init__()
        if original.running_mean is None or original.running_var is None:
            raise ValueError(f"{type(original).__name__} has no running statistics to hold fixed.")
        self.eps = original.eps
        self.register_parameter("weight", original.weight)
        self.register_parameter("bias", original.bias)
        self.register_buffer("running_mean", original.running_mean)
        self.register_buffer("running_var", original.running_var)
        self.register_buffer("num_batches_tracked", original.num_batches_tracked)
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name, which keyword callers use
        """Returns the input, normalised by the fixed statistics, channel by channel."""
        output = F.batch_norm(input, self.running_mean, self.running_var, None, None, training=False, eps=self.eps)
        shape = (-1, *(1,) * (input.dim() - 2))
        if self.weight is not None:
            output = output * self.weight.view(shape)
        return output if self.bias is None else output + self.bias.view(shape)

    def extra_repr(self) -> str:
        """Returns what printing the module shows."""
        return f"{self.running_mean.numel()}, eps={self.eps}, affine={self.weight is not None}"


def _groups(channels: int) -> int:
    """Returns the largest number of groups that divides the channels and leaves each enough of them."""
    fitting = (g for g in range(_MOST_GROUPS, 1, -1) if channels % g == 0 and channels // g >= _LEAST_CHANNELS)
    return next(fitting, 1)


def _group_norm(original: _BatchNorm) -> nn.GroupNorm:
    # A 1-d batch norm may meet (B, C) input, where several groups would normalise a few numbers each.
    channels = original.num_features
    groups = 1 if isinstance(original, nn.BatchNorm1d) else _groups(channels)
    fixed = nn.GroupNorm(groups, channels, eps=original.eps, affine=original.affine)
    # The very parameters of the (copied) original: values, type, device, requires_grad and ties all hold.
    fixed.register_parameter("weight", original.weight)
    fixed.register_parameter("bias", original.bias)
    return fixed.train(original.training)


def _replace_norm(module: nn.Module) -> nn.Module:
    if not isinstance(module, _NormBase):
        return module
    if not module.training and module.running_mean is not None:
        return FixedNorm(module)
    if isinstance(module, _BatchNorm):
        return _group_norm(module)
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        module.track_running_stats = False
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(module, name, None)
    return module


def _make_dense(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.max_norm = None
        module.scale_grad_by_freq = False
        module.sparse = False
    return module


_REPLACEMENTS: tuple[Callable[[nn.Module], nn.Module], ...] = (_replace_norm, _make_dense)


def _replacement(module: nn.Module) -> nn.Module:
    for replace in _REPLACEMENTS:
        module = replace(module)
    return module


def get_compatible_module(module: nn.Module) -> nn.Module:
    """Returns a copy of the module in which everything that `validate` refuses is replaced; the original is untouched.

    | found                                           | put in its place                                             |
    |-------------------------------------------------|--------------------------------------------------------------|
    | batch norm, in training mode or without statistics | `GroupNorm`, the weight and bias kept                     |
    | batch or instance norm in eval mode, statistics | `FixedNorm`: the same numbers as now, in either mode         |
    | instance norm that tracks statistics            | the same without them                                        |
    | embedding with max_norm, scale_grad_by_freq, sparse | the same without them                                    |

    A part that occurs several times stays one part. A copy that computes something else than the original (group for
    batch normalisation) needs training or fine-tuning. The optimizer must be made from the copy's parameters.

    Raises `UnsupportedModelError`, naming what is left, where there is no replacement.
    """
    if not validate(module):
        return copy.deepcopy(module)
    with torch.no_grad():
        copied = copy.deepcopy(module)
    memo: dict[nn.Module, nn.Module] = {}
    for parent in list(copied.modules()):
        for name, child in list(parent._modules.items()):  # noqa: SLF001  children() drops a part named twice
            if child is not None:
                if child not in memo:
                    memo[child] = _replacement(child)
                setattr(parent, name, memo[child])
    fixed = _replacement(copied)
    require_valid(fixed)
    return fixed
