"""The tripwire: a gradient that reaches a private parameter came by a way that was not captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from privet.errors import ConfigurationError, CoverageError

__all__ = ["Tripwires", "refuse_thawed"]


def refuse_thawed(module: nn.Module, known: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Returns the names of the known parameters that are trainable now, and raises if any other is."""
    ours = {id(p) for p in known.values()}
    if any(p.requires_grad and id(p) not in ours for p in _parameters_of(module, set())):
        for name, p in module.named_parameters():
            if not p.requires_grad or id(p) in ours:
                continue
            raise ConfigurationError(
                f"{name} is trainable now and was frozen, or absent, when training became private: nothing would clip "
                "its gradients. Expected the same trainable parameters. Freeze it again; or, to unfreeze it from now "
                "on, build a new module, load_state_dict() what this one learned, and make that private."
            )
    return frozenset(name for name, p in known.items() if p.requires_grad)


def _parameters_of(module: nn.Module, seen: set[int]) -> Iterator[nn.Parameter]:
    """Yields a module's parameters, shared ones more than once: without their names, which cost the most."""
    if id(module) not in seen:
        seen.add(id(module))
        yield from (p for p in module._parameters.values() if p is not None)  # noqa: SLF001 - torch's own walk names them
        for child in module._modules.values():  # noqa: SLF001
            if child is not None:
                yield from _parameters_of(child, seen)


class Tripwires:
    """A hook on each trainable parameter that raises if a gradient arrives there."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], on_gradient: Callable[[], None]) -> None:
        self._parameters = dict(parameters)
        self._on_gradient = on_gradient
        self._quiet = False
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._arrived(name, p))  # type: ignore[no-untyped-call]
            for name, p in parameters.items()
        ]

    def renew(self) -> None:
        """Puts the hooks back on, where `torch.utils.swap_tensors` has given a parameter another inside without them.

        torch does so in `module.to()` and `load_state_dict` once it is told to (torch.__future__). The parameter still
        lists its hooks then, and runs none of them; to set the list again makes it run them.
        """
        for p in self._parameters.values():
            p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks  # noqa: SLF001

    def _arrived(self, name: str, parameter: Tensor) -> None:
        """Discards all gradients, and raises, if one has arrived at a parameter."""
        if self._quiet or parameter.grad is None:  # an undefined gradient is none
            return
        # Some of the gradient may have arrived at other parameters already. No optimizer may find it there.
        for p in self._parameters.values():
            p.grad = None
        self._on_gradient()
        raise CoverageError(
            f"a gradient reached {name} by a way that was not captured per example: a penalty on the parameter added "
            "to the loss, a use outside of the private module's forward or in eval mode, or a custom autograd "
            "Function. It was discarded, and nothing was released. Use weight_decay in the optimizer for a penalty; "
            "run the parameter's layer inside the private module's forward; freeze it (requires_grad_(False)) before "
            "make_private; or register a rule (privet.register_rule)."
        )

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Lets gradients arrive inside of this context, for a check that compares them, and drops them after it."""
        before = [(p, p.grad) for p in self._parameters.values()]
        for p, _ in before:
            p.grad = None
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False
            for p, gradient in before:
                p.grad = gradient

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
