"""The private optimizer at Opacus's name: clips `p.grad_sample`, adds noise, and steps the optimizer that it wraps.

    moment                          p.grad_sample        p.summed_grad             p.grad
    after backward                  the batch's rows     as it was                 the ordinary gradient, not private
    after a step that was skipped   the batch's rows     the clipped sum so far    None
    after a step                    the batch's rows     the clipped sum           the private gradient
    after zero_grad                 None                 None, unless skipped      None or zero

The sum that is released is the core's `ClippedSum`, which carries its own sensitivity. `p.summed_grad` shows a copy of
it: a change of the copy changes nothing. Only a gradient that the core released reaches the wrapped optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from privet.clipping import ClippingPolicy, Flat
from privet.errors import ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.rows import of_type
from privet.noise import GaussianNoise, NoiseMechanism, noise_for
from privet.opacus.samplers import key_of
from privet.opacus.warning import warn
from privet.training.guard import Guard
from privet.training.materialised import clipped_rows
from privet.training.optimizers import refuse_optimizer

__all__ = ["Bill", "DPOptimizer", "params"]

_DONE = "_clipped_already"


class Bill(Protocol):
    """Where an engine's optimizer puts its steps on record."""

    def clipped(self, examples: Sequence[int]) -> None:
        """Takes note that rows were clipped and added to the sum: so many of each backward."""

    def begin(self, noise_multiplier: float, policy: ClippingPolicy) -> None:
        """Bills the release of the sum, before its noise is drawn. It raises if that cannot be done."""


def params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns the trainable parameters of an optimizer, in order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


class DPOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer, whose steps then are on clipped and noised gradients.

    The parameters are those of a `GradSampleModule`, whose backward fills `p.grad_sample`. Made by hand it counts
    nothing: attach an accountant's hook. The engine's `make_private` makes one that bills its steps itself.

    Args:
        optimizer: steps on the private gradients.
        noise_multiplier: the noise's standard deviation over the clip norm.
        max_grad_norm: the clip norm C.
        expected_batch_size: what the noisy sum is divided by; needed for a mean.
        loss_reduction: whether losses are the mean or the sum over the examples.
        generator: makes the noise reproducible, and the run not private; for tests. It is read at the first step.
        secure_mode: whether noise is cryptographically secure on every device. On CPU it always is.
        **kwargs: ignored, as Opacus does.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: Any,
        expected_batch_size: float | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}.")
        if loss_reduction == "mean" and expected_batch_size is None:
            raise ValueError("a mean needs expected_batch_size, which the noisy sum is divided by.")
        refuse_optimizer(optimizer)
        self.original_optimizer = optimizer
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = max_grad_norm
        self.loss_reduction = loss_reduction
        self.expected_batch_size = expected_batch_size
        self.generator = generator
        self.secure_mode = secure_mode
        self.step_hook: Callable[[DPOptimizer], None] | None = None
        self.bill: Bill | None = None
        self._skips: list[bool] = []
        self._is_last_step_skipped = False
        self._sum: ClippedSum | None = None
        self._noise: NoiseMechanism | None = None
        self._steps = 0
        self._released: dict[int, Tensor] = {}
        self._names = {id(p): f"{index}" for index, p in enumerate(params(optimizer))}
        for p in self.params:
            p.summed_grad = None  # type: ignore[attr-defined]

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def params(self) -> list[nn.Parameter]:
        """Returns the trainable parameters, in order."""
        return params(self)

    def name_parameters(self, named: Mapping[str, nn.Parameter]) -> None:
        """Takes the names of a module for its parameters, under which noise is drawn."""
        self._names = {id(p): name for name, p in named.items()}

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """Returns the trainable parameters by name."""
        return {self._names[id(p)]: p for p in self.params}

    @property
    def grad_samples(self) -> list[Tensor]:
        """Returns the rows of every parameter, those of several backwards one after the other."""
        return [self._get_flat_grad_sample(p) for p in self.params]

    def _get_flat_grad_sample(self, p: nn.Parameter) -> Tensor:
        rows = self._listed(p)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    @staticmethod
    def _listed(p: nn.Parameter) -> list[Tensor]:
        """Returns the rows of one parameter, backward by backward."""
        if not hasattr(p, "grad_sample"):
            raise ValueError("Per sample gradient not found: the parameter is not that of a GradSampleModule.")
        held: Any = p.grad_sample
        if held is None:
            raise ValueError(
                "Per sample gradient is not initialized: there was no backward since zero_grad(), or not in train()."
            )
        rows = held if isinstance(held, list) else [held]
        if not rows or not all(isinstance(each, Tensor) for each in rows):
            raise ValueError(f"p.grad_sample is {type(held).__name__}. Expected a tensor, or a list of tensors.")
        return rows

    @property
    def accumulated_iterations(self) -> int:
        """Returns how many backwards `p.grad_sample` holds: one for each step, or a list's length."""
        counts = {len(self._listed(p)) for p in self.params}
        if len(counts) > 1:
            raise ValueError(
                f"the parameters hold rows of {sorted(counts)} backwards. Expected the same number for all."
            )
        return counts.pop()

    # What torch asks of an optimizer is asked of the wrapped one.

    @property
    def param_groups(self) -> Any:
        """The wrapped optimizer's groups."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> Any:
        """The wrapped optimizer's defaults."""
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: Any) -> None:
        self.original_optimizer.defaults = defaults

    def state_dict(self) -> Any:
        """Returns the state of the wrapped optimizer."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Loads a state of the wrapped optimizer."""
        self.original_optimizer.load_state_dict(state_dict)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Registers a hook of the wrapped optimizer, which runs when the gradient is private."""
        return self.original_optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Registers a hook of the wrapped optimizer, which runs after its step."""
        return self.original_optimizer.register_step_post_hook(hook)

    def __repr__(self) -> str:
        """Returns the words of the wrapped optimizer."""
        return repr(self.original_optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy has: no sum that waits."""
        return {**self.__dict__, "_sum": None, "_released": {}}

    # -- one step ----------------------------------------------------------------------------------------------------

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
        """Calls `fn(optimizer)` at every step, after the noise and before the wrapped optimizer's step.

        An engine's optimizer goes on billing its steps: in Opacus this would take the accountant's hook away.
        """
        if self.bill is not None:
            warn(
                "attach_step_hook replaces the accountant's hook in Opacus, so that no step is counted any more. Here "
                "the engine's optimizer bills its steps itself, and calls your hook besides."
            )
        self.step_hook = fn

    def signal_skip_step(self, do_skip: bool = True) -> None:  # noqa: FBT001, FBT002 - Opacus's signature
        """Says whether the next step only clips and adds to the sum, or releases it. Signals wait in a queue."""
        self._skips.append(do_skip)

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:  # noqa: FBT001, FBT002 - Opacus's signature
        if not self._skips:
            return False
        return self._skips.pop(0) if pop_next else self._skips[0]

    @property
    def clipping_policy(self) -> ClippingPolicy:
        """Returns how the rows are clipped now. Override it to clip otherwise: the noise follows its sensitivity."""
        return Flat(float(self.max_grad_norm))

    @property
    def gradient_multiplier(self) -> float:
        """Returns the multiplier of the gradient's noise: the billed one, unless more is released with it."""
        return float(self.noise_multiplier)

    def clip_and_accumulate(self) -> None:
        """Clips the rows and adds them to the sum, of which `p.summed_grad` is a copy."""
        named = self.named
        by_backward = [self._listed(p) for p in named.values()]
        if any(hasattr(rows, _DONE) for each in by_backward for rows in each):
            raise ValueError(
                "Gradients haven't been cleared since the last optimizer step: their rows are in a sum already, and "
                "would count twice. Call optimizer.zero_grad() after each step."
            )
        rows = {
            name: torch.cat(each) if len(each) > 1 else each[0] for name, each in zip(named, by_backward, strict=True)
        }
        if len({len(each) for each in rows.values()}) > 1:
            raise ValueError("the parameters hold rows of different numbers of examples. Expected one row for each.")
        self.add_to_sum(clipped_rows(rows, named, self.clipping_policy), [len(each) for each in by_backward[0]])
        for each in (rows for found in by_backward for rows in found):
            setattr(each, _DONE, True)

    def add_to_sum(self, clipped: ClippedSum, examples: Sequence[int]) -> None:
        """Adds a clipped sum to that of the step at hand, and forgets the ordinary gradients."""
        self._sum = clipped if self._sum is None else self._sum.add(clipped)
        for name, p in self.named.items():
            p.summed_grad = of_type(self._sum.values[name], p.dtype).detach().clone().view_as(p)  # type: ignore[attr-defined]
            p.grad = None
        if self.bill is not None:
            self.bill.clipped(examples)

    def mechanism(self) -> NoiseMechanism:
        """Returns what adds the noise, made at the first step."""
        if self._noise is None:
            source = noise_for(self.params[0].device, secure_mode=self.secure_mode, key=key_of(self.generator, "noise"))
            self._noise = GaussianNoise(source)
        return self._noise

    def add_noise(self) -> None:
        """Bills the step, if an engine made the optimizer, and puts the sum with its noise into `p.grad`.

        Raises:
            ProtocolError: if there is no sum of the core's own, such as where a subclass formed `p.summed_grad` itself.
        """
        if self._sum is None:
            raise ProtocolError(
                "there is no clipped sum to add noise to. Expected clip_and_accumulate() before add_noise(). A "
                "subclass that clips otherwise overrides the property clipping_policy: noise is only added to a sum "
                "whose sensitivity is known, which that of a tensor in p.summed_grad is not. Nothing was released."
            )
        multiplier = float(self.noise_multiplier)
        mechanism = self.mechanism()
        if self.bill is not None:
            self.bill.begin(multiplier, self.clipping_policy)
        clipped, self._sum = self._sum, None
        step, self._steps = self._steps, self._steps + 1
        private = mechanism.release(clipped, multiplier=self.gradient_multiplier, step=step)
        named, self._released = self.named, {}
        for name, value in private.values.items():
            if name in named:
                p = named[name]
                gradient = of_type(value, p.dtype).view_as(p)
                Guard.release(p, gradient)
                self._released[id(p)] = gradient

    def scale_grad(self) -> None:
        """Divides `p.grad` by the expected batch size, in place, where losses are means."""
        if self.loss_reduction == "mean":
            assert self.expected_batch_size is not None
            for p in self.params:
                assert p.grad is not None
                p.grad.div_(self.expected_batch_size * self.accumulated_iterations)

    def pre_step(self, closure: Callable[[], Any] | None = None) -> bool:
        """Does all that comes before the wrapped optimizer's step. Returns whether that step is to be taken."""
        if not self.params:
            return True
        self.clip_and_accumulate()
        return self._after_clipping()

    def _after_clipping(self) -> bool:
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook is not None:
            self.step_hook(self)
        self._is_last_step_skipped = False
        return True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step, or only adds to the sum where a skip was signaled.

        Raises:
            ProtocolError: if a gradient is not the one that the core released.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        if not self.pre_step():
            return None
        self._refuse_other_gradients()
        return self.original_optimizer.step()

    def _refuse_other_gradients(self) -> None:
        for p in self.params:
            if p.grad is not None and self._released.get(id(p)) is not p.grad:
                raise ProtocolError(
                    f"p.grad of a parameter of shape {tuple(p.shape)} is not the tensor that noise was added to. "
                    "Expected changes in place, such as p.grad.mul_(factor), in a hook or a subclass. The parameters "
                    "were not changed."
                )

    def zero_grad(self, set_to_none: bool = False) -> None:  # noqa: FBT001, FBT002 - Opacus's signature
        """Forgets ordinary and per-example gradients, and the sum unless the last step was skipped."""
        for p in self.params:
            p.grad_sample = None  # type: ignore[attr-defined]
            if not self._is_last_step_skipped:
                p.summed_grad = None  # type: ignore[attr-defined]
        if not self._is_last_step_skipped:
            self._sum = None
        self.original_optimizer.zero_grad(set_to_none)
