"""The modules and parameters that cannot be trained privately as they are, each with the reason and the replacement.

Two things are refused here because no clipping can repair them afterwards:

* **examples that meet inside the model**: then no gradient belongs to one example alone;
* **state written from the data** (running statistics, observed ranges, renormalised tables): it leaves with the model
  and was never noised.

A normalisation that is in eval mode now reads constants, but the next `model.train()` would let it read the batch
again, without a word. It is refused too, and its replacement, `FixedNorm`, computes the same numbers in either mode.
What a class does not show (`h - h.mean(0)` in a forward) is found by `privet.validation.find_mixing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from privet.errors import ConfigurationError, UnsupportedModelError

__all__ = ["Issue", "is_compatible", "require_valid", "validate"]

_FIX = "privet.validation.get_compatible_module puts it there"


@dataclass(frozen=True)
class Issue:
    """One reason why a model cannot be trained privately as it is."""

    path: str
    """The module's or parameter's path from the root; empty for the model itself."""
    kind: str
    """The class of the module, or `Parameter`."""
    reason: str
    replacement: str

    def __str__(self) -> str:
        """Returns the issue as one line."""
        return f"{self.path or '(the model itself)'} ({self.kind}): {self.reason} Instead: {self.replacement}"


Finding = tuple[str, str]  # (reason, replacement)


def _batch_norm(module: nn.Module) -> Iterator[Finding]:
    if not isinstance(module, _BatchNorm):
        return
    if not module.training and module.running_mean is not None:
        yield (
            "it is in eval mode, but the next train() would let its statistics mix the examples of a batch.",
            f"privet.validation.FixedNorm, the same numbers in either mode ({_FIX}).",
        )
        return
    kept = " and its running statistics keep them" if module.track_running_stats else ""
    frozen = "" if any(p.requires_grad for p in module.parameters()) else " (frozen or without parameters: even so)"
    yield (
        f"the statistics of a batch mix its examples{kept}{frozen}.",
        f"GroupNorm, or LayerNorm ({_FIX}); or pretrained statistics, held fixed: call eval() on it, then fix it.",
    )


def _instance_norm(module: nn.Module) -> Iterator[Finding]:
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        yield (
            "track_running_stats=True writes statistics of the data into the model, without noise.",
            f"track_running_stats=False ({_FIX}).",
        )


def _embedding(module: nn.Module) -> Iterator[Finding]:
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return
    if module.max_norm is not None:
        yield (
            f"max_norm={module.max_norm:g} rewrites the rows that a batch looks up, without noise.",
            f"max_norm=None ({_FIX}); bound the rows after a step, all of them, if they must be bounded.",
        )
    if not module.weight.requires_grad:
        return
    if module.scale_grad_by_freq:
        yield (
            "scale_grad_by_freq=True scales an example's gradient by how often others use its tokens.",
            f"scale_grad_by_freq=False ({_FIX}).",
        )
    if module.sparse:
        yield (
            "sparse=True shows which rows a batch used; noise goes to every row, so the gradient is dense.",
            f"sparse=False ({_FIX}).",
        )


def _observer(module: nn.Module) -> Iterator[Finding]:
    # By name: torch moves these classes between packages, and importing them takes long.
    if any(parent.__name__ in {"ObserverBase", "FakeQuantizeBase"} for parent in type(module).__mro__):
        yield (
            "it records the range of the activations, which is written into the model without noise.",
            "train without it, and calibrate the quantisation on public data afterwards.",
        )


def _script(module: nn.Module) -> Iterator[Finding]:
    if isinstance(module, torch.jit.ScriptModule) and any(p.requires_grad for p in module.parameters()):
        yield (
            "it was made by torch.jit.script or torch.jit.trace: what its parameters do in there is not seen.",
            "the module that it was made from; script or trace it after training.",
        )


_NO_CAPACITY = 2**31
"""A capacity that no batch reaches."""


def _router(module: nn.Module) -> Iterator[Finding]:
    if type(module).__name__ != "NllbMoeTop2Router":  # of transformers, which is not imported for it
        return
    capacity = getattr(module, "expert_capacity", None)
    counted = getattr(module, "moe_eval_capacity_token_fraction", 1.0) > 0  # an evaluation would set another one
    if capacity is None or capacity < _NO_CAPACITY or counted:
        yield (
            "its capacity counts the tokens of the whole batch: whether a token is dropped depends on other examples.",
            "a config with expert_capacity=2**31, moe_eval_capacity_token_fraction=-1.0 (none is dropped), or Mixtral.",
        )


_RULES: tuple[Callable[[nn.Module], Iterator[Finding]], ...] = (
    _batch_norm,
    _instance_norm,
    _embedding,
    _observer,
    _script,
    _router,
)


def _parameter(parameter: nn.Parameter) -> Iterator[Finding]:
    if isinstance(parameter, UninitializedParameter):
        yield ("it has no shape yet (a lazy module).", "run the model once on data of the right shape.")
    elif not parameter.requires_grad:
        return
    elif parameter.is_complex():
        yield (
            f"its type is {parameter.dtype}; rules and noise are for real numbers.",
            "two real parameters, joined by torch.complex in the forward.",
        )
    elif parameter.layout is not torch.strided:
        yield (f"its layout is {parameter.layout}; noise goes to every entry.", "a dense parameter.")
    elif parameter.device.type == "meta":
        yield ("it is on the meta device and holds no numbers.", "module.to_empty(device=...), then initialise it.")


def _findings(module: nn.Module) -> Iterator[Issue]:
    for path, child in module.named_modules():
        for rule in _RULES:
            for reason, replacement in rule(child):
                yield Issue(path=path, kind=type(child).__name__, reason=reason, replacement=replacement)
        for name, buffer in child.named_buffers(recurse=False):
            if isinstance(buffer, UninitializedBuffer):
                where = f"{path}.{name}" if path else name
                todo = "run the model once on data of the right shape."
                yield Issue(path=where, kind="Buffer", reason="it has no shape yet (a lazy module).", replacement=todo)
    for path, parameter in module.named_parameters():
        for reason, replacement in _parameter(parameter):
            yield Issue(path=path, kind="Parameter", reason=reason, replacement=replacement)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        yield Issue(
            path="",
            kind=type(module).__name__,
            reason="it has no trainable parameter, so that there is nothing to train.",
            replacement="requires_grad_(True) on what is to be trained.",
        )


def validate(module: nn.Module) -> list[Issue]:
    """Returns every reason why the module cannot be trained privately, in the order of its parts; empty if none.

    Guarantees: nothing of the module is changed or run. An empty list says that no *known* part mixes examples or
    keeps data; a forward that does so by itself is found by `find_mixing`.
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"validate looks at a torch.nn.Module, got {type(module).__name__}.")
    return list(_findings(module))


def is_compatible(module: nn.Module) -> bool:
    """Returns whether the module can be trained privately as it is."""
    return not validate(module)


def require_valid(module: nn.Module) -> None:
    """Returns nothing if the module is valid; raises one `UnsupportedModelError` that names every offender if not."""
    issues = validate(module)
    if issues:
        lines = "\n".join(f"  {issue}" for issue in issues)
        count = "one thing keeps" if len(issues) == 1 else f"{len(issues)} things keep"
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be trained privately as it is; {count} it from that:\n{lines}"
        )
