"""A hook on a module, and what becomes of it when the module is copied: a copy refuses to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from privet.errors import ProtocolError
from privet.gradients.capture.eager import refuse_compiled

__all__ = ["Hook", "nothing", "refuse_copy"]


class Hook:
    """A hook of one instrument. A copy of the module carries a copy of the hook, which refuses to train."""

    def __init__(self, function: Callable[..., Any], in_copy: Callable[..., Any]) -> None:
        self._function = function
        self._in_copy = in_copy

    @property
    def of_copy(self) -> bool:
        """Returns whether the module that carries it is a copy."""
        return self._function is self._in_copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does the instrument's work; under torch.compile, which traces it, nothing but refuse to train."""
        if torch.compiler.is_dynamo_compiling():
            if self._in_copy is not nothing:  # the hook that a forward begins with
                refuse_compiled(trains=args[0].training and torch.is_grad_enabled())
            return None
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        # A copy has the user's hooks too, but nobody would gather its uses: it would train without privacy.
        return Hook(self._in_copy, self._in_copy)

    def __reduce__(self) -> Any:
        return (Hook, (self._in_copy, self._in_copy))


def refuse_copy(module: nn.Module, *rest: Any) -> None:
    """Raises if a copy of a private module is to be trained."""
    if module.training and torch.is_grad_enabled():
        raise ProtocolError(
            "this is a copy of a private model, and trains without privacy. Expected eval() or no_grad() of a copy. "
            "To train it with privacy, give the copy to make_private: the ledger then gets what the original has spent."
        )


def nothing(*arguments: Any) -> None:
    """Does nothing: the forward hook of a copy."""
