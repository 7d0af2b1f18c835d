"""The command line: its answers are the library's, its errors help, its exit codes tell."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
from scipy.special import ndtr, ndtri

from privet.accounting import (
    Accountant,
    FixedSizeEvent,
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    RandomAllocationEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
    get_epsilon,
)
from privet.accounting.accountant import _FACTORIES
from privet.cli import main
from privet.cli.main import cli


def run(capsys, *arguments):
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code or 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def answer(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


GAUSSIAN = GaussianEvent(1.5)
SAMPLERS = [
    (["--rate", 0.01], PoissonEvent(0.01, GAUSSIAN), Relation.ADD_OR_REMOVE_ONE),
    (["--batch-size", 500, "--dataset-size", 50000], PoissonEvent(0.01, GAUSSIAN), Relation.ADD_OR_REMOVE_ONE),
    (
        ["--sampler", "truncated-poisson", "--rate", 0.01, "--dataset-size", 50000, "--cap", 600],
        TruncatedPoissonEvent(0.01, 600, 50000, GAUSSIAN),
        Relation.ADD_OR_REMOVE_ONE,
    ),
    (
        ["--sampler", "fixed-size", "--batch-size", 500, "--dataset-size", 50000],
        FixedSizeEvent(500, 50000, GAUSSIAN),
        Relation.REPLACE_ONE,
    ),
    (
        ["--sampler", "random-allocation", "--batch-size", 500, "--dataset-size", 5000],
        RandomAllocationEvent(10, GAUSSIAN),
        Relation.ADD_OR_REMOVE_ONE,
    ),
    (["--sampler", "partition"], PartitionEvent(1, GAUSSIAN), Relation.ZERO_OUT),
    (["--sampler", "none", "--relation", "replace-one"], GAUSSIAN, Relation.REPLACE_ONE),
]


@pytest.mark.parametrize(("options", "step", "relation"), SAMPLERS)
def test_epsilon_noise_steps_and_curve_agree_for_every_sampler(capsys, options, step, relation):
    common = [*options, "--delta", 1e-5]
    event = SelfComposedEvent(step, 20)
    found = answer(capsys, "epsilon", *common, "--noise-multiplier", 1.5, "--steps", 20)
    expected = get_epsilon(event, 1e-5, relation=relation)
    assert found["epsilon"] == pytest.approx(expected, rel=1e-9)
    assert found["epsilon_lower_bound"] <= found["epsilon"]
    assert found["relation"] == relation.value
    noise = answer(capsys, "noise", *common, "--epsilon", expected, "--steps", 20)
    assert noise["noise_multiplier"] == pytest.approx(1.5, rel=1e-3)
    assert noise["epsilon"] <= noise["target_epsilon"] < noise["epsilon_outside"]
    steps = answer(capsys, "steps", *common, "--epsilon", expected * 1.001, "--noise-multiplier", 1.5)
    assert (steps["steps"], steps["outside"]) == (20, 21)
    spent = answer(capsys, "delta", *common[:-2], "--epsilon", expected, "--noise-multiplier", 1.5, "--steps", 20)
    assert spent["delta"] == pytest.approx(1e-5, rel=1e-2)
    assert spent["delta_lower_bound"] <= spent["delta"]
    curve = answer(capsys, "curve", *common, "--noise-multiplier", 1.5, "--steps", 20, "--accountant", "pld")
    assert curve["epsilon"]["pld"] == [pytest.approx(expected, rel=1e-3)]


def test_tables_for_people(capsys):
    code, out, _ = run(capsys, "epsilon", "--rate", 0.01, "--noise-multiplier", 1, "--steps", 10_000, "--delta", 1e-5)
    assert code == 0
    assert "6.18" in out
    assert "add_or_remove_one" in out
    code, out, _ = run(capsys, "curve", "--rate", 0.01, "--noise-multiplier", 1, "--steps", 100)
    assert code == 0
    assert out.count("1e-") >= 8
    assert "rdp" in out


def test_the_curve_is_drawn_into_a_file(capsys, tmp_path):
    path = tmp_path / "curve.png"
    code, out, _ = run(capsys, "curve", "--rate", 0.01, "--noise-multiplier", 1, "--steps", 100, "--plot", path)
    assert code == 0
    assert "Drawn into" in out
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 600
    assert height > 400


def test_a_plot_that_cannot_be_made_is_refused_before_anything_is_computed(capsys, tmp_path, monkeypatch):
    run_of = ["curve", "--rate", 0.01, "--noise-multiplier", 1, "--steps", 10, "--plot"]
    never = type("Never", (Accountant,), {"bound_epsilon": None, "bound_delta": None})
    monkeypatch.setitem(_FACTORIES, "pld", never)
    for name, message in [("x.nonsense", "ends in one of"), ("none/x.png", "is not a folder")]:
        code, out, err = run(capsys, *run_of, tmp_path / name)
        assert (code, out) == (2, "")
        assert message in err
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, out, err = run(capsys, *run_of, tmp_path / "x.png")
    assert (code, out) == (2, "")
    assert "pip install 'privet[plots]'" in err


def test_the_greatest_rate(capsys):
    common = ["--noise-multiplier", 1.5, "--steps", 200, "--delta", 1e-5]
    found = answer(capsys, "rate", *common, "--epsilon", 1)
    assert found["epsilon"] <= 1 < found["epsilon_outside"]
    assert found["rate"] < found["outside"] < found["rate"] * (1 + 2e-5)
    again = answer(capsys, "epsilon", *common, "--rate", found["rate"])
    assert again["epsilon"] == found["epsilon"]
    cut = ["--sampler", "truncated-poisson", "--cap", 100, "--dataset-size", 1000]
    assert answer(capsys, "rate", *cut, *common, "--epsilon", 1)["rate"] <= found["rate"]
    every = answer(capsys, "rate", *common, "--epsilon", 1000)
    assert (every["rate"], every["outside"]) == (1.0, None)
    assert "every rate fits" in every["notes"][0]


def test_groups_are_protected_by_every_command(capsys):
    group = ["--rate", 0.01, "--group-size", 3, "--json"]
    event = SelfComposedEvent(PoissonEvent(0.01, GAUSSIAN), 100)
    expected = get_epsilon(event, 1e-5, group_size=3)
    run_of = [*group, "--noise-multiplier", 1.5, "--steps", 100]
    assert answer(capsys, "epsilon", *run_of, "--delta", 1e-5)["epsilon"] == pytest.approx(expected, rel=1e-9)
    assert answer(capsys, "delta", *run_of, "--epsilon", expected)["delta"] == pytest.approx(1e-5, rel=1e-2)
    assert answer(capsys, "curve", *run_of, "--delta", 1e-5)["epsilon"]["pld"] == [pytest.approx(expected, rel=1e-3)]
    budget = ["--epsilon", expected * 1.0001, "--delta", 1e-5]
    noise = answer(capsys, "noise", *group, "--steps", 100, *budget)
    assert noise["noise_multiplier"] == pytest.approx(1.5, rel=1e-3)
    assert noise["group_size"] == 3
    assert answer(capsys, "steps", *group, "--noise-multiplier", 1.5, *budget)["steps"] == 100
    rate = answer(capsys, "rate", *group[2:], "--noise-multiplier", 1.5, "--steps", 100, *budget)
    assert rate["rate"] == pytest.approx(0.01, rel=1e-3)
    single = answer(capsys, "mu", *run_of[:2], *run_of[4:])
    assert answer(capsys, "mu", *run_of)["mu"] > single["mu"]


def test_mu_and_the_power_of_an_attack(capsys):
    found = answer(capsys, "mu", "--sampler", "none", "--noise-multiplier", 2, "--steps", 1, *FALSE_POSITIVE)
    assert found["mu"] == pytest.approx(0.5, rel=1e-3)
    assert found["mu"] >= 0.5
    for rate, power in zip([0.01, 0.1], found["true_positive_rate"], strict=True):
        exact = ndtr(ndtri(rate) + 0.5)  # Dong, Roth and Su, "Gaussian differential privacy", equation (6)
        assert power >= exact
        assert power == pytest.approx(exact, rel=0.1)


FALSE_POSITIVE = ["--false-positive-rate", 0.01, "--false-positive-rate", 0.1]


@pytest.mark.parametrize(("limit", "noise", "expected"), [(6.2, 1, 0), (6.1, 1, 3), (1e300, 0, 3)])
def test_the_exit_status_tells_whether_epsilon_is_above_a_limit(capsys, limit, noise, expected):
    common = ["epsilon", "--rate", 0.01, "--noise-multiplier", noise, "--steps", 10_000, "--delta", 1e-5]
    code, out, err = run(capsys, *common, "--max-epsilon", limit, "--json")
    assert code == expected
    assert json.loads(out)["max_epsilon"] == limit  # the answer is printed all the same
    assert ("above --max-epsilon" in err) == (expected == 3)
    assert run(capsys, *common)[0] == 0


def test_steps_that_reach_the_limit_of_the_search_say_so(capsys):
    common = ["steps", "--sampler", "none", "--noise-multiplier", 1000, "--epsilon", 1, "--delta", 1e-5]
    code, out, _ = run(capsys, *common, "--most", 70)
    assert code == 0
    assert "70 is the limit of the search (--most)" in " ".join(out.split())
    found = answer(capsys, *common)
    assert found["outside"] == found["steps"] + 1
    assert found["notes"] == []


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "privet", "epsilon", "--rate", "0.1", "--noise-multiplier", "0", "--steps", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--delta", "1e-5", "--max-epsilon", "1"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 3
    assert "inf" in done.stdout


def test_no_noise_is_infinite_and_the_json_stays_json(capsys):
    found = answer(capsys, "epsilon", "--rate", 0.01, "--noise-multiplier", 0, "--steps", 1, "--delta", 1e-5)
    assert found["epsilon"] == "inf"
    assert any("σ = 0" in note for note in found["notes"])


BASE = ["epsilon", "--noise-multiplier", 1, "--steps", 10, "--delta", 1e-5]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*BASE, "--rate", 1.5], 2, "rate must be a number in [0, 1], got 1.5"),
        ([*BASE, "--rate", "nan"], 2, "rate must be a number in [0, 1], got nan"),
        ([*BASE], 2, "takes --rate, or --batch-size and --dataset-size, got none. Add --rate."),
        ([*BASE, "--sampler", "fixed-size"], 2, "got none. Add --batch-size and --dataset-size."),
        ([*BASE, "--sampler", "truncated-poisson"], 2, "got none. Add --rate and --cap and --dataset-size."),
        ([*BASE, "--sampler", "partition", "--rate", 0.1], 2, "got --rate. Leave out --rate."),
        ([*BASE, "--batch-size", 20, "--dataset-size", 10], 2, "--batch-size must be at most --dataset-size, got 20"),
        ([*BASE, "--batch-size", 20, "--dataset-size", 0], 2, "'--dataset-size': 0 is not in the range"),
        ([*BASE, "--rate", 0.1, "--group-size", 0], 2, "'--group-size': 0 is not in the range"),
        ([*BASE, "--rate", 0.1, "--max-epsilon", -1], 2, "--max-epsilon must be a finite number of at least 0"),
        (
            ["rate", "--noise-multiplier", 1, "--steps", 1, "--epsilon", 1, "--delta", 0.1, "--sampler", "none"],
            2,
            "no rate to",
        ),
        ([*BASE, "--rate", 0.1, "--accountant", "prv"], 2, "accountant must be one of"),
        ([*BASE, "--rate", 0.1, "--steps", -1], 2, "'--steps': -1 is not in the range x>=0"),
        ([*BASE, "--rate", 0.1, "--steps", 1.5], 2, "not a valid integer"),
        ([*BASE, "--rate", 0.1, "--delta", 2], 2, "delta must be a number in [0, 1], got 2.0"),
        ([*BASE, "--rate", 0.1, "--noise-multiplier", -1], 2, "noise_multiplier must be"),
        ([*BASE, "--rat", 0.1], 2, "No such option"),
        (["noise", "--rate", 0.1, "--epsilon", 1, "--steps", 10, "--delta", 0], 1, "No noise reaches"),
        (["tree"], 2, "No such command"),
    ],
)
def test_errors_help_and_exit_codes_tell(capsys, arguments, code, message):
    found, out, err = run(capsys, *arguments)
    assert found == code
    assert message in err
    assert out == ""


@pytest.mark.parametrize("command", [[], *([each] for each in sorted(cli.commands))])
def test_help(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "Usage: privet" in out


def test_a_delta_of_one_over_n_is_said_beside_the_answer(capsys):
    asked = ("epsilon", "--noise-multiplier", 1, "--steps", 10, "--batch-size", 10, "--dataset-size", 1000)
    code, out, err = run(capsys, *asked, "--delta", 0.01, "--json")
    assert (code, "1/n or more, with n = 1000" in err) == (0, True)
    assert json.loads(out)["delta"] == 0.01
    assert run(capsys, *asked, "--delta", 1e-5, "--json")[2] == ""


def test_a_target_delta_of_one_is_refused(capsys):
    code, _, err = run(capsys, "noise", "--epsilon", 1, "--delta", 1, "--steps", 10, "--rate", 0.1)
    assert code == 2
    assert "any mechanism meets" in err
