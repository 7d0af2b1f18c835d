"""The commands on the accounting page run as they are written there."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from privet.cli import main
from privet.cli.main import cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "accounting.md"
COMMANDS = [line.strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("    privet ")]

# Commands with pages and tests of their own.
ELSEWHERE = {"audit", "check", "completion", "ledger", "plan", "report", "schedule"}


def test_every_command_is_on_the_page():
    assert {command.split()[1] for command in COMMANDS} == set(cli.commands) - ELSEWHERE


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_on_the_page_run(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command)[1:])
    assert stopped.value.code == 0
    assert "│" in capsys.readouterr().out
    assert ("--plot" in command) == bool(list(tmp_path.iterdir()))
