"""What takes the place of a batch or instance normalisation: fixed statistics, or groups of one example's channels.

A class of somebody else's that derives from torch's may do more than normalise: an activation follows, say. Such a
class is replaced only where it was seen, by numbers, to be a normalisation followed by its own parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

__all__ = ["FixedNorm", "replace_norm"]

# Group normalisation works best at 32 groups or 16 channels a group (Wu and He 2018, table 3). Below 4 channels a
# group, a group on a 1x1 map would hold too few numbers to normalise.
_MOST_GROUPS = 32
_LEAST_CHANNELS = 4

_OWN_FORWARDS = frozenset({_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward})
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


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
        self.num_features = original.num_features
        # An instance normalisation also takes one example without a batch axis.
        self._unbatched = original._get_no_batch_dim() if isinstance(original, _InstanceNorm) else None  # type: ignore[no-untyped-call]  # noqa: SLF001
        self.register_parameter("weight", original.weight)
        self.register_parameter("bias", original.bias)
        self.register_buffer("running_mean", original.running_mean)
        self.register_buffer("running_var", original.running_var)
        self.register_buffer("num_batches_tracked", original.num_batches_tracked)
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name, which keyword callers use
        """Returns the input, normalised by the fixed statistics, channel by channel."""
        if input.dim() == self._unbatched:
            return self._normalised(input.unsqueeze(0)).squeeze(0)
        return self._normalised(input)

    def _normalised(self, x: Tensor) -> Tensor:
        output = F.batch_norm(x, self.running_mean, self.running_var, None, None, training=False, eps=self.eps)
        shape = (-1, *(1,) * (x.dim() - 2))
        if self.weight is not None:
            output = output * self.weight.view(shape)
        return output if self.bias is None else output + self.bias.view(shape)

    def extra_repr(self) -> str:
        """Returns what printing the module shows."""
        return f"{self.running_mean.numel()}, eps={self.eps}, affine={self.weight is not None}"


class _FixedNormThen(FixedNorm):
    """A fixed normalisation followed by the parts that its original had, in their order."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Returns the normalised input after all parts."""
        return _through(self, super().forward(input))


class _GroupNormThen(nn.GroupNorm):
    """A group normalisation followed by the parts that its original had, in their order."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Returns the normalised input after all parts."""
        return _through(self, super().forward(input))


def _through(module: nn.Module, x: Tensor) -> Tensor:
    for part in module.children():
        x = part(x)
    return x


def replace_norm(module: _NormBase) -> nn.Module | str:
    """Returns what takes the module's place, which may be the module itself; or why nothing can.

    It has the very parameters and hooks of the module: values, type, device, `requires_grad` and ties all hold.
    """
    tracked = module.track_running_stats if isinstance(module, _InstanceNorm) else module.running_mean is not None
    if isinstance(module, LazyModuleMixin) or (isinstance(module, _InstanceNorm) and not tracked):
        return module
    if isinstance(module, _InstanceNorm) and module.training:
        module.track_running_stats = False
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(module, name, None)
        return module
    reason = _does_more(module)
    if reason is not None:
        return reason
    fixed = not module.training and tracked
    replaced = _fixed(module) if fixed else _group_norm(module)
    for name, part in module.named_children():
        replaced.add_module(name, part)
    for name in _HOOKS:
        setattr(replaced, name, getattr(module, name))
    replaced.training = module.training  # not train(): a part has a mode of its own
    return replaced


def _fixed(original: _NormBase) -> nn.Module:
    return (_FixedNormThen if original._modules else FixedNorm)(original)  # noqa: SLF001


def _group_norm(original: _NormBase) -> nn.Module:
    # A 1-d batch norm may meet (B, C) input, where several groups would normalise a few numbers each.
    channels = original.num_features
    groups = 1 if isinstance(original, nn.BatchNorm1d) else _groups(channels)
    kind = _GroupNormThen if original._modules else nn.GroupNorm  # noqa: SLF001
    replaced = kind(groups, channels, eps=original.eps, affine=original.affine)
    replaced.register_parameter("weight", original.weight)
    replaced.register_parameter("bias", original.bias)
    return replaced


def _groups(channels: int) -> int:
    """Returns the largest number of groups that divides the channels and leaves each enough of them."""
    fitting = (g for g in range(_MOST_GROUPS, 1, -1) if channels % g == 0 and channels // g >= _LEAST_CHANNELS)
    return next(fitting, 1)


# -- does a class do more than its name says? --------------------------------------------------------------------------


def _does_more(module: _NormBase) -> str | None:
    """Returns what a replacement would lose of a module, or None if nothing."""
    if parametrize.is_parametrized(module):
        return "its parameters are parametrised. Remove that before (parametrize.remove_parametrizations)."
    known = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    more = [*(set(module._parameters) | set(module._buffers)) - known]  # noqa: SLF001
    if more or "weight" not in module._parameters:  # noqa: SLF001 - an older weight_norm takes it away
        return f"it holds more than a normalisation does ({', '.join(sorted(more)) or 'a weight that is computed'})."
    if type(module).forward in _OWN_FORWARDS and not module._modules:  # noqa: SLF001
        return None
    if all(_is_norm_then_parts(module, training=mode) for mode in {False, module.training}):
        return None
    return (
        "its class has a forward of its own, which is not a normalisation followed by its parts. Put a "
        "nn.GroupNorm and what its forward adds in its place by hand, or build the model with another norm layer (in "
        "timm, norm_layer=)."
    )


def _is_norm_then_parts(module: _NormBase, *, training: bool) -> bool:
    """Returns whether the module computes what torch's normalisation does followed by the module's parts, in order."""
    trial = copy.deepcopy(module).eval()  # parts such as dropout are still
    for name in _HOOKS[:5]:
        getattr(trial, name).clear()
    trial.training = training
    # Numbers of its own for each channel: at its first ones, a normalisation commutes with an activation.
    with torch.no_grad():
        for low, t in ((-0.9, trial.weight), (0.4, trial.bias), (-0.7, trial.running_mean), (0.3, trial.running_var)):
            if t is not None:
                t.copy_(torch.linspace(low, 1.7, t.numel()))
    plain: Callable[[Tensor], Tensor] = lambda x: F.batch_norm(  # noqa: E731
        x,
        None if training else mean,
        None if training else variance,
        trial.weight,
        trial.bias,
        training,
        0.0,
        trial.eps,
    )
    mean, variance = (None if b is None else b.clone() for b in (trial.running_mean, trial.running_var))
    training = training or mean is None
    like = next((t for t in (trial.weight, mean) if t is not None), torch.zeros(()))
    compared = 0
    for spatial in ((), (3,), (3, 2), (2, 3, 2)):
        shape = (3, trial.num_features, *spatial)
        x = torch.linspace(-40.0, 55.0, torch.Size(shape).numel()).sin().mul(3.0).view(shape).to(like)
        try:
            trial._check_input_dim(x)  # type: ignore[no-untyped-call]  # noqa: SLF001
        except ValueError:  # it takes inputs of another rank
            continue
        with torch.no_grad():
            try:
                if not torch.allclose(trial(x), _through(trial, plain(x)), rtol=1e-4, atol=1e-5):
                    return False
            except Exception:  # noqa: BLE001 - whatever a class of somebody else's raises, it was not seen to be one
                return False
        compared += 1
    return compared > 0
