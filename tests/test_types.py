"""What a type checker knows of a user's script: the checker is run on small scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep  # it takes half a minute
ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
from typing import reveal_type

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privet import Flat, Gaussian, Mechanism, Performance, Poisson, PrivacyEngine, PrivateStep


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)


net = Net()
optimizer = torch.optim.AdamW(net.parameters())
data_loader: DataLoader[tuple[Tensor, ...]] = DataLoader(TensorDataset(torch.zeros(8, 3)), batch_size=4)
engine = PrivacyEngine(accountant="rdp")
mechanism = Mechanism(sampling=Poisson(0.5), clipping=Flat(1.0), noise=Gaussian(1.0))


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return torch.zeros(4)

"""
GOOD = """
three = engine.make_private(
    module=net, optimizer=optimizer, data_loader=data_loader, noise_multiplier=1.0, max_grad_norm=1.0
)
reveal_type(three)
four = engine.make_private_with_epsilon(
    module=net,
    optimizer=optimizer,
    data_loader=data_loader,
    target_epsilon=3.0,
    target_delta=1e-5,
    epochs=1,
    clipping=Flat(1.0),
    criterion=nn.CrossEntropyLoss(),
)
reveal_type(four)
net, optimizer, private = three
for (x,) in private:
    reveal_type(net.head)
    optimizer.step()
reveal_type(engine.get_epsilon(delta=1e-5))
step = PrivateStep(
    net, optimizer=optimizer, mechanism=mechanism, loss_per_example=loss, performance=Performance(passes=2)
)
for batch in step.batches(TensorDataset(torch.zeros(8, 3))):
    reveal_type(step(batch))
reveal_type(step.ledger.steps)
"""
BAD = {
    "a policy misspelt": "max_grad_norm=1.0, clipping='per-layer'",
    "a mode of another library": "max_grad_norm=1.0, grad_sample_mode='ghost'",
    "an option misspelt": "max_gradnorm=1.0",
    "a reduction that is none": "max_grad_norm=1.0, loss_reduction='none'",
}


def checked(script: Path) -> subprocess.CompletedProcess[str]:
    """Returns the finished run of the type checker.

    It has the options and the cache of the project's own checks, so that torch is looked at once for all.
    """
    return subprocess.run(
        [sys.executable, "-m", "mypy", str(script)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.slow
def test_a_strict_checker_knows_what_the_doors_return(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(HEAD + GOOD)
    run = checked(script)
    assert run.returncode == 0, run.stdout + run.stderr
    found = [
        line.partition("Revealed type is ")[2].strip('"') for line in run.stdout.splitlines() if "Revealed" in line
    ]
    # Older checkers write builtins and the type parameters out in another way.
    plain = [each.replace("builtins.", "").replace("Tuple", "tuple").replace("tuple[tuple", "tuple") for each in found]
    module, adam = "script.Net", "torch.optim.adamw.AdamW"
    loader, criterion = "privet.sampling.loader.PrivateLoader", "privet.training.criterion.PrivateCriterion"
    assert plain == [
        f"tuple[{module}, {adam}, {loader}]",
        f"tuple[{module}, {adam}, {loader}, {criterion}]",
        "torch.nn.modules.linear.Linear",
        "float",
        "torch._tensor.Tensor",
        "int",
    ]


@pytest.mark.slow
def test_a_strict_checker_sees_words_that_no_option_has(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    calls = [
        f"engine.make_private(module=net, optimizer=optimizer, data_loader=data_loader, noise_multiplier=1.0, {given})"
        for given in BAD.values()
    ]
    script.write_text(HEAD + "\n".join(calls) + "\n")
    run = checked(script)
    first = HEAD.count("\n") + 1
    for line, what in enumerate(BAD, start=first):
        assert f"script.py:{line}: error:" in run.stdout, f"{what}: {run.stdout}"
