"""A module under watch: hooks that begin and end a capture with each training forward, and the tripwires.

The module stays the user's own object, with the same class, attributes and `state_dict`. It carries two hooks, and each
trainable parameter carries one: a gradient that reaches a parameter came by a way that was not captured, and raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from privet.batches.count import count_examples
from privet.batches.cut import without_examples
from privet.batches.grow import one_of_zeros
from privet.batches.structure import Arguments
from privet.batches.tree import tensors_in
from privet.errors import ProtocolError, UnsupportedModelError
from privet.gradients.capture.anew import Anew, agree_on_doubt
from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.eager import warn_of_compiled
from privet.gradients.capture.first_batch import FirstBatch
from privet.gradients.capture.hook import Hook, nothing, refuse_copy
from privet.gradients.capture.loss_watch import LossWatch
from privet.gradients.capture.undisturbed import undisturbed
from privet.gradients.capture.watch import Watch
from privet.gradients.derived import Derivation
from privet.gradients.spread import HERE, Spread, is_part
from privet.gradients.use import Recorded, Use

__all__ = ["Instrument"]


class _Delivery:
    """The sink of a forward that the user's own backward follows: records everything, and hands it over at the end.

    Args:
        members: the examples that take part. If there are none, the uses are those of a made-up example: none is kept.
        receive: gets what was recorded.
    """

    def __init__(self, members: int, receive: Callable[[Recorded], None]) -> None:
        self._recorded = Recorded(examples=members)
        self._receive = receive

    def put(self, target: str | Derivation, use: Use) -> None:
        """Keeps one use of examples that take part."""
        if self._recorded.examples:
            self._recorded.put(target, use)

    def done(self) -> None:
        """Hands over what the backward brought."""
        self._receive(self._recorded)


def _calls_now(module: nn.Module) -> int:
    """Returns how many calls of a module have begun and not returned, in all threads."""
    found = 0
    for frame in sys._current_frames().values():  # noqa: SLF001 - there is no public way to see other threads
        at: FrameType | None = frame
        while at is not None:
            found += at.f_code.co_name == "_call_impl" and at.f_locals.get("self") is module
            at = at.f_back
    return found


class Instrument:
    """Watches one module.

    Args:
        module: the user's module.
        parameters: its trainable parameters by canonical name.
        batch_first: whether the inputs have the batch on axis 0, else on axis 1.
        mapped: whether vmap takes the place of every rule.
        on_backward: gets what each backward recorded: no use, and 0 examples, of a batch without examples.
        admit: called with parameters that became trainable, or were added, since; it raises if they may not train.
        on_check: called with the arguments of the first batch of at least two examples, after the coverage check.
        losses: looks at the loss that is computed from the outputs.
        running: a context for what is checked, which tells the other ranks of an error in it.
        spread: the processes that hold the module together.
        on_forward: called with all tensors that a training forward is given, and whether it is the first of a backward.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        batch_first: bool = True,
        mapped: bool = False,
        on_backward: Callable[[Recorded], None],
        admit: Callable[[Mapping[str, nn.Parameter]], None] | None = None,
        on_check: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
        losses: LossWatch | None = None,
        running: Callable[[], AbstractContextManager[None]] = nullcontext,
        spread: Spread = HERE,
        on_forward: Callable[[list[Tensor], bool], None] | None = None,
    ) -> None:
        self._watch = Watch(
            module,
            parameters,
            within=module.forward,
            batch_first=batch_first,
            mapped=mapped,
            spread=spread,
            admit=admit,
        )
        self.capture = self._watch.capture
        self._module = module
        self._axis = 0 if batch_first else 1
        self._on_backward = on_backward
        self._losses = losses
        self._running = running
        self._spread = spread
        self._on_forward = on_forward
        self._suspended = False  # while the check runs the model
        self._inputs: Arguments | None = None  # of the forward that runs
        self._again = False  # whether this forward is run anew, from inside of the hook that ends it
        self._output: Any = None  # of the forward that was run anew
        self._length: int | None = None  # of the example that is made up for an empty batch, once it is known
        self._nested = 0  # calls of the module from inside of its own forward
        warn_of_compiled(module)
        self._first = FirstBatch(
            module,
            self.capture,
            self._watch.tripwires,
            self._checked_outputs,
            batch_axis=self._axis,
            also=None if on_check is None else lambda inputs: on_check(*inputs),
            spread=spread,
        )
        self._anew = Anew(self.capture, self._look_at, spread=spread)
        # Parameters are gathered by a hook that runs first. What we do before a forward may run the whole module.
        first = bool(spread.gathering)
        self._handles = [
            module.register_forward_pre_hook(Hook(self._before, refuse_copy), with_kwargs=True, prepend=first),
            module.register_forward_hook(Hook(self._after, nothing), always_call=True),
        ]
        self._watch.begin()

    @property
    def examples(self) -> int | None:
        """Returns the number of examples of the forward that is being trained on, or None."""
        cycle = self.capture.cycle
        return None if cycle is None else cycle.members

    def remove(self) -> None:
        """Makes the module an ordinary one again."""
        if self._losses is not None:
            self._losses.end()
        self._watch.end()
        for handle in self._handles:
            handle.remove()

    # -- the two hooks -----------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begins a capture if this forward is trained on; returns other arguments if the batch has no examples."""
        if self._again and self._inputs is not None:
            inputs, self._inputs = self._inputs, None  # calls from inside of the forward are not this one
            return inputs
        if self._suspended or self._inside_forward():
            return None
        if not module.training or not torch.is_grad_enabled() or self.capture.watching:
            return None
        trainable = self._watch.trains()
        if not trainable:  # gradients pass through to the inputs, as for a discriminator held fixed
            return None
        self._first.trains(trainable)
        self._watch.tripwires.renew()
        inputs = Arguments(args, kwargs)
        self._spread.require_alike(tensors_in(inputs))
        members = count_examples(inputs, self._axis, name="the inputs")
        examples, replaced = members, None
        if members == 0:
            examples = 1
            inputs = replaced = self._made_up(inputs)
        cycle = self.capture.cycle
        pending = cycle is not None and not cycle.queued
        wanted = self._first.wanted(inputs, examples, pending=pending)  # an empty batch too: where is its one example?
        if wanted is not None:
            self._check(*wanted)
        cycle = self.capture.cycle
        self._inputs = inputs
        self._anew.begins()
        self._begin(inputs, members, examples)
        if self._on_forward is not None:
            try:
                self._on_forward(tensors_in(inputs), self.capture.cycle is not cycle)
            except BaseException:
                self.capture.release()
                raise
        return replaced

    def _made_up(self, inputs: Arguments) -> Arguments:
        """Returns the inputs with one example in the place of none: of zeros, or of a length that the model takes.

        Torch packs no sequence of length zero. So a model that does not run on zeros is tried on whole numbers of one.
        """
        zeros: Arguments = one_of_zeros(inputs, axis=self._axis)
        ones: Arguments = one_of_zeros(inputs, axis=self._axis, length=1)
        if self._length is None:
            alike = all(map(torch.equal, tensors_in(zeros), tensors_in(ones)))
            # Where others would have to take part in a trial, there is none.
            tried = not (alike or self._spread.collective)
            self._length = int(tried and not self._runs(zeros) and self._runs(ones))
        return ones if self._length else zeros

    def _runs(self, inputs: Arguments) -> bool:
        """Returns whether the module runs on some inputs; leaves nothing behind."""
        self._suspended = True
        try:
            with undisturbed(self._module), torch.no_grad():
                self._module(*inputs.args, **inputs.kwargs)
        except Exception:  # noqa: BLE001 - whatever a model says of zeros; it is said again by the forward
            return False
        finally:
            self._suspended = False
        return True

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Ends the forward that `_before` began; returns another output if the batch has no examples."""
        cycle = self.capture.cycle
        if self._suspended or cycle is None or not cycle.running:
            return None
        if self._nested:
            self._nested -= 1
            return None
        if self._again:
            self._output = output
            return None
        inputs, self._inputs = self._inputs, None
        if output is None:  # the forward raised
            self.capture.release()
            return None
        replaced = None
        agree_on_doubt(self.capture, self._spread)
        if cycle.doubt is not None and inputs is not None:
            output = replaced = self._run_anew(inputs, cycle)
        outputs = self._outputs(output)
        self.capture.end(outputs)
        if not cycle.made_up:
            self._check_outputs(outputs, cycle.examples)
            if self._losses is not None:
                self._losses.follow(outputs, cycle.examples, self.capture.release, telling=self._running)
            return replaced
        return without_examples(output, self._axis)

    def _run_anew(self, inputs: Arguments, cycle: Cycle) -> Any:
        """Looks at the batch of a forward that ended in doubt, runs it anew, and returns its output."""
        doubt = cycle.doubt
        assert doubt is not None

        def forward() -> Any:
            self.capture.take_up(cycle)
            self._inputs, self._again = inputs, True
            try:
                self._module(*inputs.args, **inputs.kwargs)
                return self._output  # as this hook saw it: hooks after it are still to come
            finally:
                self._inputs, self._again, self._output = None, False, None

        self.capture.set_aside()
        try:
            return self._anew.run(inputs, cycle.examples, doubt, forward)
        except BaseException:
            self.capture.release()
            cycle.close()
            raise

    def _inside_forward(self) -> bool:
        """Counts a call from inside of the module's own forward, and returns whether this is one.

        A forward that was interrupted (KeyboardInterrupt) never came to `_after`, and looks as if it still ran. Its
        call is not on any stack any more; then it is dropped.
        """
        cycle = self.capture.cycle
        if cycle is not None and cycle.running:
            if _calls_now(self._module) > 1:  # the call at hand is one of them
                self._nested += 1
                return True
            self.capture.release()
        self._nested = 0
        return False

    def _begin(self, inputs: Arguments, members: int, examples: int) -> None:
        """Begins a cycle, or goes on with one whose backward is still to come and that has the same examples."""
        cycle = self.capture.cycle
        if cycle is None or cycle.queued:  # a queued one has a backward that broke off
            sink = _Delivery(members, self._on_backward)
            if self._losses is not None:
                self._losses.begin()
            self.capture.begin(examples, sink, made_up=members == 0, inputs=inputs)
        elif cycle.members == members:
            self.capture.resume(inputs)
        else:
            self.capture.release()
            raise ProtocolError(
                f"a forward of {members} examples follows one of {cycle.members} that had no backward. "
                "Expected forwards that share a backward to be of the same examples. Run backward after each forward; "
                "use eval() or no_grad() for a forward that is not trained on."
            )

    def _fail(self, error: Exception) -> None:
        """Drops the forward, and raises."""
        self.capture.release()
        raise error

    # -- what is asked of the model ----------------------------------------------------------------------------------

    def _outputs(self, output: Any) -> list[Tensor]:
        return [t for t in tensors_in(output) if t.requires_grad]

    def _check_outputs(self, outputs: list[Tensor], examples: int) -> None:
        """Raises if an output hides how the examples were put together."""
        for o in outputs:
            if is_part(o):
                self._fail(UnsupportedModelError(
                    "the model returned a tensor that is distributed over ranks. Expected one that is whole on each of "
                    "them. Give the last plan output_layouts=Replicate(), and leave use_local_output=True."
                ))  # fmt: skip
            if o.dim() == 0:
                self._fail(UnsupportedModelError(
                    "the model returned a scalar that needs a gradient, such as a loss of its own: it hides how the "
                    "examples were put together, and so what one example can do. Expected outputs with one row for "
                    "each example. Compute the loss from them (do not pass labels to a model that then reduces a "
                    "loss; of a model of transformers, privet.integrations.huggingface computes the loss of each "
                    "example: model_inputs, per_example_loss, PrivateTrainer), or use PrivateStep with a loss per "
                    "example. A load-balancing loss of a mixture of experts is over the batch: leave it away "
                    "(output_router_logits=False)."
                ))  # fmt: skip
            elif o.dim() <= self._axis or o.shape[self._axis] != examples:
                self._fail(UnsupportedModelError(
                    f"the model returned a tensor of shape {tuple(o.shape)} for {examples} examples. Expected the "
                    f"batch on axis {self._axis}. Return one row for each example."
                ))  # fmt: skip

    def _checked_outputs(self, inputs: Arguments) -> list[Tensor]:
        """Runs the module, and returns its differentiable outputs if every one has a row for each example."""
        outputs = self._outputs(self._module(*inputs.args, **inputs.kwargs))
        self._check_outputs(outputs, count_examples(inputs, self._axis, name="the inputs"))
        return outputs

    def _look_at(self, inputs: Arguments, examples: int) -> None:
        """Checks all of one batch, of which it is not certain which rows are whose."""
        self._check(inputs, examples, whole=True)

    def _check(self, inputs: Arguments, examples: int, *, whole: bool = False) -> None:
        """Checks one batch, with the hooks suspended while the check calls the module."""
        self._suspended = True
        try:
            with self._running():
                self._first.run(inputs, examples, whole=whole)
        finally:
            self._suspended = False
