"""Looks at the loss that a user computes from the outputs of a private module, while its backward runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from privet.errors import ConfigurationError, PrivetError
from privet.gradients.capture.call import refuse_second_derivative
from privet.gradients.capture.loss_graph import read_graph
from privet.gradients.capture.loss_rules import TokenMean, faults_of, is_divided, token_means

__all__ = ["LossWatch"]

_OFTEN = 8  # backwards from the start that are all looked at; later ones are where their number is a power of two
_SATURATED = 50.0  # a softmax whose largest logit leads by more may round a gradient to exactly zero


class LossWatch:
    """Raises from inside the backward if the loss is known to rescale one example by another.

        watch.follow(outputs, examples)     # after each forward
        watch.trust(losses)                 # losses that were computed for each example alone

    It looks at the first backwards, and at every one whose number is a power of two. What it cannot see: what happened
    to the targets before the loss, values that autograd did not keep, a loss that was compiled, or that is one
    operation of the user's own.

    Args:
        mean: whether the loss is declared a mean over the examples, else a sum.
        axis: the batch axis of the outputs.
        expects_criterion: whether a backward must go through trusted losses.
        divided_by: a number that each loss is declared to be divided by, for gradients that are accumulated.
    """

    def __init__(self, *, mean: bool, axis: int, expects_criterion: bool = False, divided_by: int = 1) -> None:
        self._mean = mean
        self._axis = axis
        self._expects_criterion = expects_criterion
        self._divided_by = divided_by
        self._outputs: list[Any] = []  # nodes of the forwards at hand
        self._trusted: list[Any] = []
        self._due = False
        self._ended = False
        self._backwards = 0
        self._token_means: list[TokenMean] = []

    def end(self) -> None:
        """Looks at no loss any more."""
        self.begin()
        self._ended = True

    def begin(self) -> None:
        """Forgets the forwards before: their graph must not be kept alive."""
        self._outputs.clear()
        self._trusted.clear()

    def trust(self, losses: Tensor) -> None:
        """Takes note of losses that were computed for each example alone: what lies below them is not looked at."""
        if losses.grad_fn is not None and not self._ended:
            self._trusted.append(losses.grad_fn)

    def follow(
        self,
        outputs: Sequence[Tensor],
        examples: int,
        on_fault: Callable[[], None],
        *,
        telling: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Looks at the loss when the gradient of the outputs comes; calls `on_fault` before it raises."""
        self._due = examples > 1  # one example rescales nobody

        def reached(gradient: Tensor, values: Tensor) -> None:
            try:
                with telling():  # an error on one rank is one on all
                    refuse_second_derivative()
                    self._look(examples)
                    self._look_at_tokens(gradient, values)
            except PrivetError:
                on_fault()
                raise

        for output in outputs:
            if output.grad_fn is not None:
                self._outputs.append(output.grad_fn)
                values = output.detach()
                output.register_hook(lambda gradient, values=values: reached(gradient, values))  # type: ignore[no-untyped-call]

    def _look(self, examples: int) -> None:
        if not self._due:
            return
        self._due, self._token_means = False, []
        self._backwards += 1
        trusted, stops = {*self._trusted}, [*self._outputs, *self._trusted]
        self.begin()
        if self._backwards > _OFTEN and self._backwards & (self._backwards - 1):
            return
        graph = read_graph(stops)
        if graph is None:
            return
        if self._expects_criterion and not trusted & graph.ends.keys():
            raise ConfigurationError(
                "criterion= was given to make_private, and the loss of this backward was computed by something else: "
                "nothing splits that into its examples. Expected the private criterion, the fourth of what "
                "make_private returns. Call it on outputs and targets, or leave criterion= away."
            )
        self._token_means = token_means(graph)
        faults = list(faults_of(graph, examples=examples, axis=self._axis, mean=self._mean, trusted=trusted))
        if faults:
            raise _refused(faults[0])
        if self._divided_by > 1 and not is_divided(graph):
            raise ConfigurationError(
                f"accumulate={self._divided_by} says that each mean loss is divided by {self._divided_by}, and this "
                f"one is divided by nothing. Expected (loss / {self._divided_by}).backward(). Or say that it is not "
                f"divided: accumulate=Accumulate({self._divided_by}, divided=False); the step is the same. Nothing "
                "was released."
            )

    def _look_at_tokens(self, gradient: Tensor, values: Tensor) -> None:
        """Raises if labels were left out of a mean over all tokens: their gradient is exactly zero."""
        for each in self._token_means:
            axis = -1 if gradient.shape[-1:] == (each.classes,) else 1
            if gradient.dim() < 2 or gradient.shape[axis] != each.classes or each.classes < 2:
                continue
            tokens = gradient.numel() // each.classes
            first, second = values.topk(2, dim=axis).values.unbind(axis)
            silent = (gradient == 0).all(axis) & (first - second < _SATURATED)
            unused = int(silent.sum())
            # Positions that were sliced away have no gradient either.
            if max(tokens - each.tokens, 0) < unused < tokens:
                raise _refused(
                    "it is a mean over the tokens of all examples, some of which are left out by ignore_index: how "
                    "many one example leaves out rescales the others. Take the mean of each example's own losses first"
                )


def _refused(fault: str) -> ConfigurationError:
    return ConfigurationError(
        f"the loss is no sum of one loss for each example: {fault}. Expected losses that depend on one example each, "
        "added up or averaged over the rows of the batch. Pass criterion= to make_private, which evaluates a criterion "
        "on each example alone, or use PrivateStep with a loss per example. Nothing was released."
    )
