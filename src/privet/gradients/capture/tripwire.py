"""The tripwire: a gradient that reaches a private parameter came by a way that was not captured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from privet.errors import CoverageError

__all__ = ["Tripwires", "thawed"]


def thawed(module: nn.Module, known: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Returns the parameters that are trainable now and are none of the known ones, by name.

    Args:
        module: the private module.
        known: its parameters, and objects that stand for parameters while a module runs, and maybe after it.
    """
    ours = {id(p) for p in known}
    if not any(p.requires_grad and id(p) not in ours for p in _parameters_of(module, set())):
        return {}
    return {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in ours}


def _parameters_of(module: nn.Module, seen: set[int]) -> Iterator[nn.Parameter]:
    """Yields a module's parameters, shared ones more than once: without their names, which cost the most."""
    if id(module) not in seen:
        seen.add(id(module))
        yield from (p for p in module._parameters.values() if p is not None)  # noqa: SLF001 - torch's own walk names them
        for child in module._modules.values():  # noqa: SLF001
            if child is not None:
                yield from _parameters_of(child, seen)


def _in_reentrant_checkpoint() -> bool:
    """Returns whether the backward of a part that a reentrant checkpoint has computed again runs in this thread."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
        frame = frame.f_back
    return False


class Tripwires:
    """A hook on each trainable parameter that raises if a gradient arrives there."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], on_gradient: Callable[[], None]) -> None:
        self._parameters: list[nn.Parameter] = []
        self._on_gradient = on_gradient
        self._collected: dict[str, Tensor] | None = None  # while a check compares what arrives
        self._handles: list[RemovableHandle] = []
        for name, p in parameters.items():
            self.add(name, p)

    def add(self, name: str, parameter: nn.Parameter) -> None:
        """Puts a hook on one more object that stands for a parameter."""
        self._parameters.append(parameter)
        hook = parameter.register_post_accumulate_grad_hook(lambda p: self._arrived(name, p))  # type: ignore[no-untyped-call]
        self._handles.append(hook)

    def renew(self) -> None:
        """Puts the hooks back on, where `torch.utils.swap_tensors` has given a parameter another inside without them.

        torch does so in `module.to()` and `load_state_dict` once it is told to (torch.__future__). The parameter still
        lists its hooks then, and runs none of them; to set the list again makes it run them.
        """
        for p in self._parameters:
            p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks  # noqa: SLF001

    def _arrived(self, name: str, parameter: Tensor) -> None:
        """Discards all gradients, and raises, if one has arrived at a parameter."""
        if parameter.grad is None:  # an undefined gradient is none
            return
        if self._collected is None and any(other.collects(parameter) for other in _COLLECTING):
            return  # it is for the check of another network, which shares this parameter and takes the gradient away
        if self._collected is not None:
            # Taken away at once: whoever gathers and shards parameters may take it elsewhere.
            gradient, parameter.grad = parameter.grad, None
            before = self._collected.get(name)
            self._collected[name] = gradient if before is None else before + gradient
            return
        # Some of the gradient may have arrived at other parameters already. No optimizer may find it there.
        for p in self._parameters:
            p.grad = None
        self._on_gradient()
        if _in_reentrant_checkpoint():
            raise CoverageError(
                f"a gradient reached {name} inside of a reentrant checkpoint, which computes a part again. "
                "Its results are cut off from what made them, so a tensor made of parameters alone, such as a table of "
                "relative positions that later layers share, takes back one gradient for all examples. It was "
                "discarded, and nothing was released. Expected checkpoints that are not reentrant: pass "
                "use_reentrant=False (transformers: gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                "{'use_reentrant': False}))."
            )
        raise CoverageError(
            f"a gradient reached {name} by a way that was not captured per example: a penalty on the parameter added "
            "to the loss, a use outside of the private module's forward or in eval mode, or a custom autograd "
            "Function. It was discarded, and nothing was released. Use weight_decay in the optimizer for a penalty; "
            "run the parameter's layer inside the private module's forward; freeze it (requires_grad_(False)) before "
            "make_private; or register a rule for the module that calls the Function (privet.register_rule; "
            "docs/models.md has it in full)."
        )

    @contextmanager
    def quiet(self) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Collects the gradients that arrive inside of this context, for a check that compares them.

        Yields a function that returns those that arrived since it was called last, by name. None is left in `p.grad`.
        """
        before = [(p, p.grad) for p in self._parameters]
        for p, _ in before:
            p.grad = None

        def arrived() -> dict[str, Tensor]:
            found, self._collected = self._collected, {}
            return found or {}

        self._collected = {}
        _COLLECTING.append(self)
        try:
            yield arrived
        finally:
            _COLLECTING.remove(self)
            self._collected = None
            for p, gradient in before:
                p.grad = gradient

    def collects(self, parameter: Tensor) -> bool:
        """Returns whether gradients that arrive at a parameter are for a check of this object's network."""
        return self._collected is not None and any(p is parameter for p in self._parameters)

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        for p in self._parameters:
            if not p._post_accumulate_grad_hooks:  # noqa: SLF001 - torch leaves an empty list of hooks behind
                p._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # noqa: SLF001


_COLLECTING: list[Tripwires] = []
"""Those whose network is being checked now."""
