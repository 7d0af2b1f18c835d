"""`privet schedule`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import stat

import pytest

from privet import DrawnSchedule, Poisson, RandomAllocation, TruncatedPoisson
from privet.cli import main
from privet.sampling import memberships


def run(*arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["schedule", *arguments])
    printed = capsys.readouterr()
    return stopped.value.code, printed.out, printed.err


DATA = ("--dataset-size", "400", "--batch-size", "40")


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ((), Poisson(0.1)),
        (("--sampler", "truncated-poisson"), TruncatedPoisson(0.1, 76, 400)),
        (("--sampler", "truncated-poisson", "--cap", "50"), TruncatedPoisson(0.1, 50, 400)),
        (("--sampler", "random-allocation"), RandomAllocation(10)),
    ],
    ids=str,
)
def test_the_schedule_is_the_one_that_was_asked_for_and_is_not_printed(tmp_path, capsys, options, law):
    folder = tmp_path / "schedule"
    code, out, _ = run(str(folder), *DATA, *options, "--passes", "2", "--json", capsys=capsys)
    said = json.loads(out)
    found = DrawnSchedule.open(folder)
    assert code == 0
    assert found.law == law
    assert (said["digest"], said["steps"]) == (found.digest, 20)
    assert set(said) == {
        "folder", "law", "dataset_size", "passes", "steps_per_pass", "steps", "expected_batch_size", "digest", "notes"
    }  # fmt: skip
    assert "secret" in said["notes"][0]


def test_a_kept_key_finds_the_same_members_and_is_for_its_owner_alone(tmp_path, capsys):
    folder, key = tmp_path / "schedule", tmp_path / "key"
    code, out, _ = run(str(folder), *DATA, "--key-file", str(key), capsys=capsys)
    assert code == 0
    assert key.read_bytes().hex() not in out
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    members = memberships(key.read_bytes(), Poisson(0.1), dataset_size=400, number=1, block=0)
    schedule = DrawnSchedule.open(folder)
    for step in range(10):
        batch = schedule.draw(None, size=400, number=1, index=step, shared=None)
        assert members.records[members.steps == step].tolist() == batch


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cap", "50"), "--cap is of truncated-poisson"),
        (("--batch-size", "401"), "--batch-size must be at most --dataset-size 400, got 401"),
        (("--key-file", "there"), "--key-file there exists"),
        (("--sampler", "truncated-poisson", "--cap", "0"), "--cap"),
    ],
)
def test_options_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("")
    code, _, err = run("schedule", *DATA, *options, capsys=capsys)
    assert code == 2
    assert said in err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_that_exists_is_refused_and_its_key_too(tmp_path, capsys):
    run(str(tmp_path / "schedule"), *DATA, capsys=capsys)
    code, _, err = run(str(tmp_path / "schedule"), *DATA, "--key-file", str(tmp_path / "key"), capsys=capsys)
    assert code == 2
    assert "exists" in err
    assert not (tmp_path / "key").exists()
