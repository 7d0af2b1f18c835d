"""Runs the test suite of Opacus 1.6.0 against `privet.opacus`, and prints how many tests pass, file by file.

    python scripts/opacus_suite.py FOLDER [--target privet.opacus] [--only accountants_test.py] [--whole]

FOLDER is the package `opacus` of an unpacked Opacus 1.6.0 that holds its `tests`. They are copied to a temporary folder
with their imports renamed; nothing of them is kept here. torchvision is not needed: where it is not installed, a small
stand-in is put on the path (`FakeData`, a few transforms, and models with the batch norm that the tests look for).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

NOT_RUN: Mapping[str, str] = {
    "multigpu_": "needs several GPUs",
    "multidevice_optimizer_test": "needs several GPUs",
    "ddp_hook_check": "needs several GPUs",
    "mixed_precision_test": "needs a GPU: it is skipped without one",
}
"""Parts of the names of files that are not run, each with its reason."""

INTERNALS: Mapping[str, str] = {
    "grad_sample_module_test.py::test_standard_module_validation": "asks for the attribute ft_compute_sample_grad",
    "grad_sample_module_fast_gradient_clipping_test.py::test_standard_module_validation": "likewise",
    "grad_sample_hooks_test.py::test_standard_module_validation": "likewise",
    "privacy_engine_validation_test.py::test_custom_linear_hooks": "likewise",
    "privacy_engine_validation_test.py::test_unsupported_hooks": "likewise",
    "privacy_engine_validation_test.py::test_extra_param_hooks_requires_grad": "likewise",
    "grad_sample_hooks_fast_gradient_clipping_test.py::test_cleanup": "asks for the attribute _forward_counter",
}
"""Tests that look at private internals of Opacus, which are not run, each with its reason."""

DIFFERS: Mapping[str, str] = {
    "test_deterministic_run": "noise and batches that follow the global seed are not secret",
    "test_global_seed": "noise and batches that follow the global seed are not secret",
    "BatchMemoryManager": "its loss compares outputs (B, 1) with targets (B,), which mixes examples: refused",
    "test_unsupported_ew": "the core trains what torch's expanded weights cannot",
    "test_extra_param_ew": "the core trains what torch's expanded weights cannot",
    "test_empty_first_batch_with_dp_dataloader": "there is no first batch without a structure to warn of",
    "test_is_valid_non_learnable_bn": "a batch norm without trainable parameters mixes examples all the same: refused",
    "EmbeddingLayerTest": "losses (B, 1) times all clip factors, and two backwards through one forward",
    "gdp": "holds the figure of the central limit, which is no bound",
    "prv": "holds to 4 or 7 digits a figure that has a tolerance of 1e-2; here it is smaller, and a bound",
    "test_make_private_with_epsilon": "sequence-first data without batch_first=False: rows are not examples, refused",
    "test_noise_level": "a statistic of few numbers, which holds for the seed that it was written with",
    "RNN_test": "packed sequences are not trained: pad them",
    "Embedding_bag_test": "the first input has no row for each example",
}
"""Parts of the names of tests that fail here, each with its reason."""

STAND_IN = {
    "torchvision/__init__.py": "from . import datasets, models, transforms\n",
    "torchvision/datasets.py": '''
import torch


class FakeData(torch.utils.data.Dataset):
    """Random images, each drawn from a seed of its own."""

    def __init__(self, size=1000, image_size=(3, 224, 224), num_classes=10, transform=None, target_transform=None,
                 random_offset=0):
        self.size, self.image_size, self.num_classes = size, image_size, num_classes
        self.transform, self.random_offset = transform, random_offset

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index + self.random_offset)
        image = torch.rand(self.image_size, generator=generator)
        target = int(torch.randint(0, self.num_classes, (1,), generator=generator))
        return (image if self.transform is None else self.transform(image)), target

    def __len__(self):
        return self.size
''',
    "torchvision/transforms.py": """
import torch


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class ToTensor:
    def __call__(self, image):
        return image


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, image):
        return (image - self.mean) / self.std
""",
    "torchvision/models.py": '''
from torch import nn


class _Net(nn.Module):
    """A convolution, a batch norm and a classifier: what the tests look for in a real one."""

    def __init__(self, classes=1000):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(32, classes)

    def forward(self, x):
        return self.classifier(self.pool(self.norm(self.conv(x)).relu()).flatten(1))


def resnet18(weights=None, **kwargs):
    return _Net()


def densenet121(weights=None, **kwargs):
    return _Net()


def mobilenet_v3_small(weights=None, **kwargs):
    return _Net()
''',
}


def renamed(text: str, target: str) -> str:
    """Returns the source of a test with `opacus` renamed, in imports and in the names that mocks are given."""
    text = re.sub(r"\bfrom opacus\b", f"from {target}", text)
    # A private helper that skipped tests alone use; without this line the whole file could not be imported.
    text = text.replace(f"from {target}.optimizers.optimizer import _generate_noise\n", "_generate_noise = None\n")
    text = re.sub(r"(?m)^(\s*)import opacus$", rf"\1import {target} as opacus", text)
    return re.sub(r"""(["'])opacus\.""", rf"\1{target}.", text)


def prepared(source: Path, folder: Path, target: str) -> Path:
    """Copies the tests into a folder, with the stand-in beside them, and returns where they lie."""
    tests = folder / "opacus_tests"
    shutil.copytree(source / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
    for path in tests.rglob("*.py"):
        path.write_text(renamed(path.read_text(), target))
    if importlib.util.find_spec("torchvision") is None:
        for name, text in STAND_IN.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return tests


def run(file: Path, folder: Path, *, seconds: int, whole: bool) -> tuple[dict[str, str], str]:
    """Returns the outcome of every test of one file by its name, and what pytest wrote."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--rootdir",
        str(folder),
    ]
    command += [f"--junitxml={report}", "--tb=short", "-W", "ignore", str(file.relative_to(folder))]
    inside = [test.partition("::")[2] for test in INTERNALS if test.partition("::")[0] == file.name]
    command += ["-k", f"not ({' or '.join(inside)})"] if inside else []
    # The tests draw examples with Hypothesis: few of them say the same in less time.
    settings = "" if whole else "import hypothesis\nhypothesis.settings.register_profile('few', max_examples=5, "
    settings += "" if whole else "deadline=None, derandomize=True)\nhypothesis.settings.load_profile('few')\n"
    (folder / "conftest.py").write_text(settings)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {str(file.name): "failed"}, f"more than {seconds} seconds"
    if not report.exists():
        return {str(file.name): "failed"}, ran.stdout + ran.stderr
    outcomes = {}
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - pytest wrote it just now
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}.{case.get('name')}"] = outcome
    return outcomes, ran.stdout


def main() -> int:
    """Runs what was asked for, prints a line for each file, and returns 0 if at least 95 of 100 tests passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path, help="the package `opacus` of an unpacked Opacus 1.6.0")
    parser.add_argument("--target", default="privet.opacus", help="what `opacus` is renamed to")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the files to run")
    parser.add_argument("--seconds", type=int, default=600, help="how long one file may take")
    parser.add_argument("--whole", action="store_true", help="as many drawn examples as Opacus asks for")
    parser.add_argument("--verbose", action="store_true", help="print what pytest wrote")
    options = parser.parse_args()
    total: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = prepared(options.folder, folder, options.target)
        for file in sorted(tests.rglob("*_test.py")):
            shown = file.relative_to(tests).as_posix()
            reason = next((why for part, why in NOT_RUN.items() if part in shown), None)
            if options.only and not any(part in shown for part in options.only):
                continue
            if reason is not None:
                print(f"{shown:60} not run: {reason}", flush=True)
                continue
            outcomes, written = run(file, folder, seconds=options.seconds, whole=options.whole)
            counted = {kind: sum(o == kind for o in outcomes.values()) for kind in total}
            total = {kind: total[kind] + counted[kind] for kind in total}
            failed += [test for test, outcome in outcomes.items() if outcome == "failed"]
            print(f"{shown:60} " + ", ".join(f"{n} {kind}" for kind, n in counted.items() if n), flush=True)
            if options.verbose or (counted["failed"] and len(outcomes) == 1 and "more than" in written):
                print(written)
    for test in failed:
        print(f"failed: {test}: {next((why for part, why in DIFFERS.items() if part in test), 'NOT EXPECTED')}")
    print(f"{len(INTERNALS)} names of tests that look at private internals were not run")
    ran = total["passed"] + total["failed"]
    share = 100.0 * total["passed"] / max(ran, 1)
    print(f"{total['passed']} of {ran} passed ({share:.1f} %), {total['skipped']} skipped by Opacus itself")
    return 0 if share >= 95.0 else 1


if __name__ == "__main__":
    sys.exit(main())
