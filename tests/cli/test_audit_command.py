"""`privet audit mechanism`: its verdict, its status, and what it says of a name that leads nowhere."""

from __future__ import annotations

import json

import pytest

from privet.cli import main

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from torch import nn
from tests.audit.trainings import PlainTraining, data

def right():
    return PlainTraining(), nn.Linear(6, 3), data()

def wrong():
    return PlainTraining(mistake="noise divided by the world size"), nn.Linear(6, 3), data()

def other():
    return 5
"""


@pytest.fixture
def program(tmp_path, monkeypatch, request):
    (tmp_path / "audited_training.py").write_text(PROGRAM.format(root=str(request.config.rootpath)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "audited_training"


def status(*arguments):
    with pytest.raises(SystemExit) as found:
        main(["audit", "mechanism", *arguments])
    return found.value.code


def test_verdict_and_status(program, tmp_path, capsys):
    assert status(f"{program}:right", "--canaries", "200", "--no-rows", "--out", str(tmp_path / "found.json")) == 0
    assert "nothing contradicts the claim" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["kind"] == "mechanism"
    assert status(f"{program}:wrong", "--canaries", "200", "--no-rows", "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["lower_bound"] > found["claimed"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere:train", "no module 'nowhere'"),
        ("audited_training:missing", "has no 'missing'"),
        ("audited_training", "MODULE:FACTORY"),
        ("audited_training:other", "a tuple of three"),
    ],
)
def test_names_that_lead_nowhere(program, capsys, name, said):
    assert status(name) == 2
    assert said in capsys.readouterr().err
