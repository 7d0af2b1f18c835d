"""Tries the package as it is installed, on other versions of Python and torch: the oldest supported and newer ones.

A wheel is built and installed in an environment of its own for each pair, with what the wheel asks for and nothing from
this checkout on the path. Then the command line answers, a network trains, and the tests of `TESTS` run against the
installed package. A Python that this machine lacks is named and left out.

    python scripts/matrix.py                  every pair: gigabytes of torch, many minutes
    python scripts/matrix.py 3.12:2.6.0       this pair alone
    python scripts/matrix.py --keep FOLDER    make the environments there, and use those that are there
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ("3.11:2.13.0", "3.12:2.6.0", "3.13:2.14.1", "3.14:2.14.1")
TESTED_WITH = (
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "mpmath>=1.3",
    "jsonschema>=4.18",
    "matplotlib>=3.8",
)
TESTS = (
    "tests/test_step.py",
    "tests/test_engine.py",
    "tests/test_both_doors.py",
    "tests/gradients/rules/test_rules_reference.py",
    "tests/gradients/test_tied.py",
    "tests/training",
    "tests/sampling",
    "tests/noise",
    "tests/accounting/test_accounting_tables.py",
    "tests/accounting/test_accounting_ledger.py",
)
TRAINS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import privet
assert "site-packages" in privet.__file__, privet.__file__
data = TensorDataset(torch.randn(256, 8), torch.randint(3, (256,)))
module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer, engine = torch.optim.Adam(module.parameters()), privet.PrivacyEngine()
module, optimizer, loader = engine.make_private(
    module=module, optimizer=optimizer, data_loader=DataLoader(data, batch_size=32), noise_multiplier=1.0,
    max_grad_norm=1.0,
)
for x, y in loader:
    nn.functional.cross_entropy(module(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained: epsilon", round(engine.get_epsilon(delta=1e-3), 3), "torch", torch.__version__)
"""


def environment(pair: str, wheel: Path, folder: Path) -> Path | None:
    """Returns the interpreter of an environment with this pair and the wheel, or None without such a Python."""
    python, torch = pair.split(":")
    interpreter = shutil.which(f"python{python}")
    found = interpreter and subprocess.run([interpreter, "--version"], capture_output=True, check=False).returncode == 0
    if not found:
        print(f"{pair}: left out, this machine has no python{python}")
        return None
    place = folder / pair.replace(":", "-")
    program = place / "bin" / "python"
    if not program.exists():
        subprocess.run([str(interpreter), "-m", "venv", str(place)], check=True)
    install = [str(program), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"torch=={torch}", str(wheel), *TESTED_WITH, "scikit-learn>=1.4"], check=True)
    subprocess.run([*install, "--force-reinstall", "--no-deps", str(wheel)], check=True)
    return program


def tried(pair: str, program: Path) -> bool:
    """Runs the command line, a training and the tests in one environment, and returns whether all went well."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as elsewhere:
        question = ["epsilon", "--rate", "0.01", "--noise-multiplier", "1", "--steps", "1000", "--delta", "1e-5"]
        commands = {
            "command line": [str(program), "-m", "privet", *question, "--json"],
            "training": [str(program), "-W", "ignore", "-c", TRAINS],
        }
        failed = [
            name
            for name, command in commands.items()
            if subprocess.run(command, cwd=elsewhere, env=clean, check=False).returncode != 0
        ]
        # The tests are copied, so that `src` of this checkout is on nobody's path.
        copy = Path(elsewhere) / "copy"
        for name in ("tests", "benchmarks", "examples", "attacks", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        pytest = [
            str(program),
            "-m",
            "pytest",
            "-q",
            "-n",
            os.environ.get("WORKERS", "auto"),
            "-m",
            "not deep and not slow",
        ]
        if subprocess.run([*pytest, *TESTS], cwd=copy, env=clean, check=False).returncode != 0:
            failed.append("tests")
    print(f"{pair}: {'failed: ' + ', '.join(failed) if failed else 'all went well'}")
    return not failed


def main() -> int:
    """Tries the pairs, and returns 0 if all that could be made went well, and any could."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", default=PAIRS, help="PYTHON:TORCH")
    parser.add_argument("--keep", type=Path, help="a folder for the environments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep.resolve() if options.keep else Path(temporary)
        wheels = Path(temporary) / "wheels"
        build = ["wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
        subprocess.run([sys.executable, "-m", "pip", *build], check=True)
        (wheel,) = wheels.glob("privet-*.whl")
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} kB")
        programs = {pair: environment(pair, wheel, folder) for pair in options.pairs}
        results = [tried(pair, program) for pair, program in programs.items() if program is not None]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
