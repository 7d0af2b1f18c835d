"""`privet check`, `plan`, `ledger` and `completion`: what they say, and the exit status of each outcome."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from privet.accounting import FileLedger, GaussianEvent, PoissonEvent, get_accountant, repeated
from privet.cli import main
from privet.cli.main import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")
PROGRAM = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
MORE = """

def mixing():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
        def forward(self, x):
            return self.head(x - x.mean(0))
    return Mixing(), torch.randn(5, 4)

def alone():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

def reading_its_neighbor():
    def loss(model, batch):
        return model(batch[0]).sum(1) * batch[0].mean()
    return nn.Linear(3, 2), (torch.randn(6, 3),), loss

def by_name():
    return nn.Linear(3, 2), {"input": torch.randn(6, 3)}

def other():
    return 5
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    (tmp_path / "shop.py").write_text(PROGRAM + MORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "shop", raising=False)


def run(*arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    printed = capsys.readouterr()
    return stopped.value.code, printed.out, printed.err


def answer(*arguments, capsys):
    status, out, _ = run(*arguments, "--json", capsys=capsys)
    return status, json.loads(out)


def test_a_model_that_can_be_trained(capsys):
    status, found = answer("check", "shop:network", capsys=capsys)
    assert status == 0
    assert found["trainable"]
    assert found["parameters"] == 8 * 32 + 32 + 32 * 3 + 3
    assert found["examples"] == 16
    assert found["private_step_ms"] > 0 < found["plain_step_ms"]
    assert math.isclose(found["private_over_plain"], found["private_step_ms"] / found["plain_step_ms"], rel_tol=0.05)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("alone", "1 (BatchNorm1d)"),
        ("mixing", "depends on the other examples"),
        ("reading_its_neighbor", "depends on the other examples"),
    ],
)
def test_a_model_that_is_refused(factory, reason, capsys):
    status, found = answer("check", f"shop:{factory}", capsys=capsys)
    assert status == 5
    assert not found["trainable"]
    assert reason in " ".join(found["issues"])
    assert "private_step_ms" not in found


def test_inputs_by_name(capsys):
    status, found = answer("check", "shop:by_name", capsys=capsys)
    assert (status, found["issues"]) == (0, [])


def test_a_factory_of_another_form_is_told_which_forms_there_are(capsys):
    for command in (["check", "shop:other"], ["check", "shop:nothing"], ["check", "nowhere:network"]):
        status, _, err = run(*command, capsys=capsys)
        assert status == 2
        assert "returned int" in err or "has no 'nothing'" in err or "no module 'nowhere'" in err


BUDGET = ["--dataset-size", "5000", "--epochs", "3", "--epsilon", "2", "--delta", "1e-5"]


def test_a_plan_keeps_the_budget_and_no_less_noise_does(capsys):
    status, found = answer("plan", *BUDGET, "--batch-size", "500", "--batch-size", "64", capsys=capsys)
    assert status == 0
    assert [each["batch_size"] for each in found["plans"]] == [64, 500]
    for each in found["plans"]:
        assert each["steps"] == 3 * math.ceil(5000 / each["batch_size"])
        assert math.isclose(each["rate"], each["batch_size"] / 5000)

        def epsilon(sigma, each=each):
            event = repeated(PoissonEvent(each["rate"], GaussianEvent(sigma)), each["steps"])
            return get_accountant("pld").epsilon(event, 1e-5)

        assert epsilon(each["noise_multiplier"]) <= 2.0 < epsilon(0.99 * each["noise_multiplier"])
        assert math.isclose(each["noise_of_the_mean"], each["noise_multiplier"] / each["batch_size"])


def test_a_plan_measures_a_model(capsys):
    status, found = answer("plan", *BUDGET, "--batch-size", "500", "--model", "shop:network", capsys=capsys)
    assert status == 0
    assert found["plans"][0]["hours"] > 0
    status, _, err = run("plan", *BUDGET, "--model", "shop:alone", capsys=capsys)
    assert status == 2
    assert "must return three things" in err


def test_a_plan_of_impossible_sizes(capsys):
    assert run("plan", *BUDGET, "--batch-size", "6000", capsys=capsys)[0] == 2
    status, found = answer("plan", "--dataset-size", "3", *BUDGET[2:], capsys=capsys)
    assert status == 0
    assert [each["batch_size"] for each in found["plans"]] == [1]


def test_a_ledger_is_printed_and_not_changed(capsys):
    ledger = FileLedger("run.ledger")
    ledger.begin(PoissonEvent(0.01, GaussianEvent(1.1)), 40)
    before = Path("run.ledger").read_bytes()
    status, found = answer("ledger", "run.ledger", "--delta", "1e-5", capsys=capsys)
    assert status == 0
    assert found["steps"] == 40
    assert found["epsilon"] == ledger.epsilon(1e-5)
    assert "Poisson sampling" in found["phases"][0]["sampling"]
    assert Path("run.ledger").read_bytes() == before
    assert run("ledger", "none.ledger", capsys=capsys)[0] in {1, 2}
    assert not Path("none.ledger").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_the_program(shell, capsys):
    status, out, _ = run("completion", shell, capsys=capsys)
    assert status == 0
    assert "_PRIVET_COMPLETE" in out


def test_completion_knows_every_command(capsys, monkeypatch):
    monkeypatch.setenv("_PRIVET_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "privet ")
    monkeypatch.setenv("COMP_CWORD", "1")
    _, out, _ = run(capsys=capsys)
    assert {line.partition(",")[2] for line in out.split()} >= set(cli.commands)


def test_the_commands_on_the_page_run(capsys):
    FileLedger("run.ledger").begin(GaussianEvent(1.0))
    commands = [line.strip() for line in PAGE.splitlines() if line.startswith("    privet ")]
    assert len(commands) == 4
    for command in commands:
        status, out, _ = run(*shlex.split(command)[1:], capsys=capsys)
        assert status == 0, command
        assert "│" in out
