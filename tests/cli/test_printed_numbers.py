"""What people read and act on is rounded to the safe side: typed back in, it still holds."""

from __future__ import annotations

import json

import pytest

from privet.accounting import (
    Accountant,
    Bound,
    GaussianEvent,
    PoissonEvent,
    SelfComposedEvent,
    get_epsilon,
    register_accountant,
)
from privet.accounting.accountant import _FACTORIES
from privet.cli import main


@pytest.fixture
def table(capsys):
    """Returns a function that runs a command and returns its rows, as people read them, and as programs do."""

    def read(*arguments):
        outputs = []
        for extra in ([], ["--json"]):
            with pytest.raises(SystemExit) as stopped:
                main([*map(str, arguments), *extra])
            assert not stopped.value.code
            outputs.append(capsys.readouterr().out)
        rows = [line.strip("│").split("│") for line in outputs[0].splitlines() if line.startswith("│")]
        return {name.strip(): rest[0].strip() for name, *rest in rows}, json.loads(outputs[1])

    return read


def test_the_printed_noise_still_fits(table):
    for target in (0.3, 1.0, 8.0):
        rows, exact = table("noise", "--rate", 0.01, "--steps", 1000, "--epsilon", target, "--delta", 1e-5)
        sigma = float(rows["noise multiplier"])
        assert sigma >= exact["noise_multiplier"]
        assert get_epsilon(SelfComposedEvent(PoissonEvent(0.01, GaussianEvent(sigma)), 1000), 1e-5) <= target
        assert float(rows["epsilon"]) >= exact["epsilon"]


def test_the_printed_rate_still_fits(table):
    rows, exact = table("rate", "--noise-multiplier", 1, "--steps", 1000, "--epsilon", 1, "--delta", 1e-5)
    rate = float(rows["rate"])
    assert rate <= exact["rate"]
    assert get_epsilon(SelfComposedEvent(PoissonEvent(rate, GaussianEvent(1.0)), 1000), 1e-5) <= 1.0


class Told(Accountant):
    """An accountant that answers with numbers it was told."""

    name = "told"
    upper = lower = 0.0

    def bound_epsilon(self, event, delta, *, relation, group_size, lower):
        return Bound(upper=self.upper, lower=self.lower, method=self.name)

    bound_delta = bound_epsilon


@pytest.fixture
def told():
    register_accountant("told", Told)
    yield Told
    _FACTORIES.pop("told")


NUMBERS = [6.1885533, 1e-30, 0.99999999, 1234567.8, 0.1, 12.5, 1.0000001e-7, 3.0]


@pytest.mark.parametrize("upper", NUMBERS)
def test_epsilon_and_delta_are_printed_up_and_lower_bounds_down(table, told, upper):
    told.upper, told.lower = upper, upper * 0.98765432
    run = ["--rate", 0.1, "--noise-multiplier", 1, "--steps", 1, "--accountant", "told"]
    for name, question in [("epsilon", ["--delta", 1e-5]), ("delta", ["--epsilon", 1])]:
        rows, exact = table(name, *run, *question)
        assert exact[name] == upper
        assert exact[f"{name}_lower_bound"] == told.lower
        assert upper <= float(rows[name]) <= upper * (1 + 1e-5)
        assert told.lower * (1 - 1e-5) <= float(rows[f"{name} lower bound"]) <= told.lower
    rows, exact = table("curve", *run, "--delta", 1e-5)
    assert exact["epsilon"]["told"] == [upper]
    assert upper <= float(rows["1e-05"]) <= upper * (1 + 1e-5)
