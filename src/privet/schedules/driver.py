"""The schedule of a run: an object that takes a running mechanism along its plan, one `step()` after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch

from privet._checks import check_count
from privet.errors import ConfigurationError
from privet.mechanism import Mechanism
from privet.schedules.course import Course
from privet.schedules.plan import Plan
from privet.training.update import update_of

__all__ = ["Schedule"]


@final
class Schedule:
    """Changes the mechanism of an optimizer's private steps over training.

    Args:
        optimizer: the one that make_private returned, or that PrivateStep was given.
        noise: the course of the noise multiplier.
        clip_norm: the course of the clip norm.
        rate: the course of the sampling rate, and with it of the expected batch size.

    Each number starts where it is now. Call `step()` between logical steps: after each optimizer's step, or once a
    pass. Several schedules of different numbers may go side by side.

    Example:
        >>> import torch
        >>> from privet import Exponential, PrivacyEngine, Schedule
        >>> engine, model = PrivacyEngine(), torch.nn.Linear(4, 2)
        >>> model, optimizer, loader = engine.make_private(
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=torch.utils.data.DataLoader(torch.zeros(64, 4), batch_size=16),
        ...     noise_multiplier=2.0,
        ...     max_grad_norm=1.0,
        ... )
        >>> schedule = Schedule(optimizer, noise=Exponential(0.5))
        >>> schedule.step()
        >>> engine.mechanisms[0].noise
        Gaussian(multiplier=1.0)

    Guarantees:
        What is billed is what is released: the mechanism that the ledger reads is the one that clips and adds noise,
        and it changes between logical steps only. A course that gives a number which is negative, zero, nan or infinite
        raises before anything is released with it; mechanism and ledger stay as they were.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise: Course | None = None,
        clip_norm: Course | None = None,
        rate: Course | None = None,
    ) -> None:
        self._update = update_of(optimizer)
        self._plan = Plan(self._update.mechanism, noise=noise, clip_norm=clip_norm, rate=rate)
        taken = {name for other in self._update.schedules if isinstance(other, Schedule) for name in other.courses}
        twice = sorted(taken & set(self.courses))
        if twice or not self.courses:
            raise ConfigurationError(
                f"{', '.join(twice)} of this optimizer is scheduled already. Expected one schedule for each."
                if twice
                else "a Schedule without a course changes nothing. Expected noise, clip_norm or rate."
            )
        self._t = 0
        self._set(0)
        if rate is not None:
            self._update.loaders.expect_resampling()
        self._update.schedules.append(self)

    @staticmethod
    def following(plan: Plan, optimizer: torch.optim.Optimizer) -> Schedule:
        """Returns the schedule that takes an optimizer's steps along a plan, a `step()` after each `plan.every`.

        Raises:
            ConfigurationError: if what the optimizer's steps release now is not what the plan begins with.
        """
        now, begins = update_of(optimizer).mechanism, plan.mechanism
        if (now.sampling, now.clipping, now.noise) != (begins.sampling, begins.clipping, begins.noise):
            raise ConfigurationError(
                f"the plan begins with {begins}, and the steps of this optimizer release {now}. Expected the same. "
                "Make the model private with the noise, clipping and sampling of plan.mechanism."
            )
        return Schedule(optimizer, noise=plan.noise, clip_norm=plan.clip_norm, rate=plan.rate)

    @property
    def courses(self) -> dict[str, Course]:
        """Returns the courses by what they change."""
        named = {"noise": self._plan.noise, "clip_norm": self._plan.clip_norm, "rate": self._plan.rate}
        return {name: course for name, course in named.items() if course is not None}

    @property
    def steps(self) -> int:
        """Returns how many schedule steps were taken."""
        return self._t

    @property
    def mechanism(self) -> Mechanism:
        """Returns what the next step of the optimizer releases."""
        return self._update.mechanism

    def plan(self, steps: int, *, every: int = 1) -> Plan:
        """Returns the plan of a run of `steps` logical steps (or passes), a schedule step after each `every`.

        It has this schedule's courses alone, not those of others that may go beside it.
        """
        mechanism = Mechanism(
            sampling=self._plan.mechanism.sampling,
            clipping=self._plan.mechanism.clipping,
            noise=self._plan.mechanism.noise,
            steps=steps,
        )
        return Plan(
            mechanism, noise=self._plan.noise, clip_norm=self._plan.clip_norm, rate=self._plan.rate, every=every
        )

    def step(self) -> None:
        """Goes one step along the courses.

        Raises:
            ProtocolError: inside a logical step.
            ConfigurationError: if a course gives a number that is out of range. Nothing was changed.
        """
        self._set(self._t + 1)
        self._t += 1

    def _set(self, t: int) -> None:
        mechanism = self._plan.at(t, current=self._update.mechanism)
        if mechanism != self._update.mechanism:
            self._update.reschedule(mechanism)

    def state_dict(self) -> dict[str, Any]:
        """Returns where the schedule is. Checkpoints hold it already. Courses are code, for the user to build again."""
        return {"steps": self._t, "factors": self._factors(self._t)}

    def _factors(self, t: int) -> dict[str, float]:
        return {name: float(course(t)) for name, course in self.courses.items()}

    def refuse_state(self, state: Mapping[str, Any]) -> None:
        """Raises if the state was saved by a schedule that had other factors at that step."""
        t = check_count("steps", state["steps"])
        expected, found = self._factors(t), dict(state["factors"])
        if found != expected:
            raise ConfigurationError(
                f"the state is of another schedule: at step {t} its factors were {found}, and this one's are "
                f"{expected}. Expected the same courses. Build the schedules of the saved run, in the same order."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where the saved schedule was."""
        self.refuse_state(state)
        t = int(state["steps"])
        self._set(t)
        self._t = t
