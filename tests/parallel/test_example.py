"""The example trains on two processes of torchrun, and says the same ε as in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def said(*command, example=("ddp.py", "--epochs", "3")):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    ran = subprocess.run(
        [sys.executable, *command, str(ROOT / "examples" / example[0]), *example[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.deep
def test_the_example_runs_under_torchrun_and_prints_once():
    several = said("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert "ranks: 2 ranks, DistributedDataParallel on each, gloo" in several
    epsilons = [re.findall(r"at ε = ([\d.]+),", text) for text in (several, said())]
    assert epsilons == [["8.00"], ["8.00"]]


@pytest.mark.deep
@pytest.mark.parametrize("processes", [2, 4])
def test_the_tensor_parallel_example_learns_and_prints_once(processes):
    options = ("--data-parallel", "2") if processes == 4 else ()
    several = said(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        example=("tensor_parallel.py", *options),
    )
    found = "2x2 ranks, fully_shard over" if options else "2 ranks,"
    assert f"ranks: {found} a tensor parallel plan on each, gloo" in several
    ((before, after, epsilon),) = re.findall(r"sentences ([\d.]+) before and ([\d.]+) after, at ε = ([\d.]+),", several)
    assert float(after) < 0.4 * float(before)
    assert epsilon == "8.00"


@pytest.mark.deep
def test_the_sharded_example_learns_on_two_processes_and_prints_once():
    several = said("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example=("fsdp_lora.py",))
    ((before, after, epsilon),) = re.findall(r"sentences ([\d.]+) before and ([\d.]+) after, at ε = ([\d.]+),", several)
    assert float(after) < 0.6 * float(before)
    assert epsilon == "8.00"
