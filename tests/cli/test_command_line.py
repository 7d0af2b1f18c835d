"""The command line: its answers are the library's, its errors help, its exit codes tell."""

from __future__ import annotations

import json
import struct

import pytest

from privet.accounting import (
    FixedSizeEvent,
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
    get_epsilon,
)
from privet.cli import main


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
    steps = answer(capsys, "steps", *common, "--epsilon", expected * 1.001, "--noise-multiplier", 1.5)
    assert steps["steps"] == 20
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
    code, _, err = run(
        capsys, "curve", "--rate", 0.01, "--noise-multiplier", 1, "--steps", 10, "--plot", tmp_path / "x.nonsense"
    )
    assert code == 2
    assert "cannot be written" in err


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
        ([*BASE], 2, "needs --rate (or --batch-size with --dataset-size)"),
        ([*BASE, "--sampler", "fixed-size"], 2, "needs --batch-size and --dataset-size"),
        ([*BASE, "--sampler", "truncated-poisson"], 2, "needs --cap and --dataset-size and --rate"),
        ([*BASE, "--rate", 0.1, "--accountant", "prv"], 2, "accountant must be one of"),
        ([*BASE, "--rate", 0.1, "--steps", -1], 2, "count must be a whole number"),
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


@pytest.mark.parametrize("command", [[], ["epsilon"], ["noise"], ["steps"], ["curve"]])
def test_help(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "Usage: privet" in out
