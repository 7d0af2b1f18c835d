"""Averages of the weights over the steps of a run: post-processing, so that nothing is billed.

The noise of each step is in the weights of that step. An average over many steps has less of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from privet._checks import check_count, check_probability
from privet.errors import ConfigurationError
from privet.parallel import bare
from privet.training.update import update_of

__all__ = ["WeightAverage"]


@final
class WeightAverage:
    """Averages the weights of a private model after every step of its optimizer.

    With `decay` it is an exponential moving average, which begins at the weights of now, and whose decay rises with the
    number of updates t: `min(decay, (1 + t) / (10 + t))`. So the first weights are soon forgotten. (De et al., 2022,
    arXiv:2204.13650, section 3.2.) Without `decay` it is the plain mean of the weights after every step but the first
    `start` ones.

    A step is one private release: physical batches of a virtual step, and batches that only accumulate, count nothing.
    Averages are kept in float32 at least, one value for each parameter, frozen ones included. Buffers are not averaged:
    the averaged model has those of now. On several ranks each averages what it holds.

    Args:
        model: the model, after it was made private.
        optimizer: the private optimizer of it.
        decay: of the exponential moving average, such as 0.999; None for the mean.
        start: how many updates are left out at the beginning.

    Raises:
        ConfigurationError: for options that are out of range, or an optimizer that is not private.

    Example:
        >>> import torch
        >>> from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep, WeightAverage
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mechanism = Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.1), steps=4)
        >>> step = PrivateStep(
        ...     model, optimizer=optimizer, mechanism=mechanism, loss_per_example=lambda m, b: m(b[0]).square().sum(1)
        ... )
        >>> average = WeightAverage(model, optimizer, decay=0.99)
        >>> for batch in step.batches(torch.utils.data.TensorDataset(torch.randn(64, 4))):
        ...     losses = step(batch)
        >>> average.updates
        4
        >>> average.averaged_model()
        Linear(in_features=4, out_features=1, bias=True)
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, decay: float | None = None, start: int = 0
    ) -> None:
        if decay is not None:
            decay = check_probability("decay", decay)
        self._decay, self._start = decay, check_count("start", start, 0)
        self._model, self._run = bare(model), update_of(optimizer)
        self._averages = {name: _wide(p) for name, p in self._model.named_parameters()}
        self.updates = 0
        self._seen = self._run.steps
        optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, *rest: Any) -> None:
        """Takes in a step of the optimizer, once, and only if it has released something."""
        if self._run.steps != self._seen:
            self._seen = self._run.steps
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of now into the average. The optimizer's steps call it."""
        counted = self.updates - self._start  # updates before this one that count
        self.updates += 1
        if counted < 0:
            weight = 1.0  # the average follows the weights until it begins
        elif self._decay is None:
            weight = 1.0 / (counted + 1)
        else:
            weight = 1.0 - min(self._decay, (1 + counted) / (10 + counted))
        for name, p in self._parameters().items():
            average = self._averages[name]
            average.lerp_(p.detach().to(average.dtype), weight)

    def averaged_model(self) -> nn.Module:
        """Returns a copy of the model with the averaged weights, in eval mode. It is to be looked at, not trained."""
        twin = copy.deepcopy(self._model).eval()
        self._write(twin)
        return twin

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """A context in which the model itself has the averaged weights, for models that are large or sharded.

        Do not train in it. At its end the model has its own weights again, to the bit.
        """
        own = {name: p.detach().clone() for name, p in self._parameters().items()}
        try:
            self._write(self._model)
            yield self._model
        finally:
            with torch.no_grad():
                for name, p in self._parameters().items():
                    p.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs. Give it to `save_checkpoint` as a part of `extra`."""
        return {"updates": self.updates, "averages": {name: value.clone() for name, value in self._averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state; load the model and the optimizer as well.

        Raises:
            ConfigurationError: if the state is of another model. Nothing is changed then.
        """
        averages = state["averages"]
        shapes, own = ({name: tuple(v.shape) for name, v in found.items()} for found in (averages, self._averages))
        if shapes != own:
            raise ConfigurationError(
                f"the state has averages of {sorted(shapes)}, and this model has parameters {sorted(own)}. Expected "
                "the same names and shapes. Load it into the average of the model that it was saved of."
            )
        self.updates, self._seen = check_count("updates", state["updates"], 0), self._run.steps
        for name, value in averages.items():
            self._averages[name].copy_(value)

    def _parameters(self) -> dict[str, nn.Parameter]:
        found = dict(self._model.named_parameters())
        if found.keys() != self._averages.keys():
            raise ConfigurationError(
                f"the parameters of {type(self._model).__name__} are not those of before: "
                f"{sorted(found.keys() ^ self._averages.keys())}. Expected the same all along. Make a new one."
            )
        return found

    @torch.no_grad()
    def _write(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self._averages[name])


@torch.no_grad()
def _wide(p: Tensor) -> Tensor:
    """Returns a copy in float32 at least: a small weight would vanish in 16 bits."""
    wide = p.detach().clone()
    return wide.float() if wide.dtype in (torch.float16, torch.bfloat16) else wide
