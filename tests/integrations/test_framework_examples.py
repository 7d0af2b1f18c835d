"""The examples of Lightning and Accelerate learn, in one process and in two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.deep
@pytest.mark.parametrize(
    ("command", "example"),
    [
        ([sys.executable], ["lightning_digits.py"]),
        ([sys.executable], ["lightning_digits.py", "--devices", "2"]),
        ([sys.executable], ["accelerate_digits.py"]),
        (
            [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
            ["accelerate_digits.py", "--accumulate", "2"],
        ),
    ],
    ids=["Lightning", "Lightning on two", "Accelerate", "Accelerate on two"],
)
def test_an_example_learns(command, example, tmp_path):
    settings = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = [*command, str(ROOT / "examples" / example[0]), *example[1:], "--epochs", "5"]
    ran = subprocess.run(
        script, capture_output=True, text=True, timeout=300, env={**os.environ, **settings}, cwd=tmp_path, check=False
    )
    assert ran.returncode == 0, ran.stderr
    ((accuracy, epsilon),) = re.findall(r"accuracy ([\d.]+)% on held-out digits at ε = ([\d.]+),", ran.stdout)
    assert float(accuracy) > 70
    assert epsilon == "8.00"
