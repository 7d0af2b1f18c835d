"""Runs the tests that touch numbers as other processors would, on other seeds and numbers of threads.

Torch and its libraries choose their kernels by what the processor can do, and sum in another order with each choice.
A test that is green with one choice alone says something about the processor and not about the code. Choices that this
machine lacks are skipped, and named.

    python scripts/test_cpus.py            every choice: many minutes
    python scripts/test_cpus.py --short    two choices, the most telling tests: about a minute
    python scripts/test_cpus.py NAME ...   these choices alone
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("DEFAULT", "AVX2", "AVX512")  # as torch names them, each able to do what those before it can


@dataclass(frozen=True)
class Choice:
    """One choice of kernels, with a seed of its own.

    Attributes:
        level: what the processor must be able to do.
        environment: what makes torch, oneDNN and MKL choose.
    """

    level: str
    environment: dict[str, str]
    seed: int
    threads: int


CHOICES = {
    "default": Choice("DEFAULT", {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, 1, 1),
    "avx2": Choice("AVX2", {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}, 2, 1),
    "avx512": Choice("AVX512", {"ATEN_CPU_CAPABILITY": "avx512"}, 3, 2),
    "onednn-sse41": Choice("DEFAULT", {"ONEDNN_MAX_CPU_ISA": "SSE41"}, 4, 2),
    "onednn-avx2": Choice("AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, 5, 1),
}
WITHOUT_NUMBERS = (
    "tests/accounting",  # of NumPy and SciPy in float64, without a kernel that torch chooses
    "tests/cli",
    "tests/sampling",
    "tests/test_architecture.py",
    "tests/test_architecture_tree.py",
    "tests/test_documentation.py",
    "tests/test_public_surface.py",
)
NUMBERS = ("tests", *(f"--ignore={path}" for path in WITHOUT_NUMBERS))
SHORT = ("default", "avx2")
TELLING = ("tests/gradients/rules/test_rules_reference.py", "tests/gradients/test_tied.py")


def run(choice: Choice, tests: tuple[str, ...]) -> int:
    """Runs the tests under one choice, and returns pytest's exit status."""
    environment = {
        **os.environ,
        **choice.environment,
        "OMP_NUM_THREADS": str(choice.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait in a loop starve the others of a busy machine
        "PRIVET_TEST_SEED": str(choice.seed),
        "PRIVET_TEST_THREADS": str(choice.threads),
        "HYPOTHESIS_PROFILE": "explore",
    }
    workers = os.environ.get("WORKERS") or str(max(1, (os.cpu_count() or 1) // choice.threads))
    options = ["-q", "-p", "tests.machine", "-n", workers, "-m", "not slow", f"--hypothesis-seed={choice.seed}"]
    return subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, env=environment).returncode  # noqa: PLW1510


def main(arguments: list[str]) -> int:
    """Runs the choices, and returns 0 if all that this machine can make are green."""
    short = arguments == ["--short"]
    names = SHORT if short else tuple(arguments) or tuple(CHOICES)
    unknown = [name for name in names if name not in CHOICES]
    if unknown:
        print(f"scripts/test_cpus.py: unknown {', '.join(unknown)}; known: --short, {', '.join(CHOICES)}")
        return 2
    able = torch.backends.cpu.get_cpu_capability()
    reach = LEVELS.index(able) if able in LEVELS else -1  # not an x86 processor: none of the choices is there
    outcomes = {}
    for name in names:
        choice = CHOICES[name]
        if LEVELS.index(choice.level) > reach:
            outcomes[name] = f"skipped: needs {choice.level}, and this machine has {able}"
            print(f"==> {name}: {outcomes[name]}", flush=True)
            continue
        given = " ".join(f"{key}={value}" for key, value in choice.environment.items())
        print(f"==> {name}: {given}, seed {choice.seed}, {choice.threads} threads", flush=True)
        status = run(choice, TELLING if short else NUMBERS)
        outcomes[name] = "green" if status == 0 else f"pytest's exit status {status}"
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    return int(any(outcome.startswith("pytest") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
