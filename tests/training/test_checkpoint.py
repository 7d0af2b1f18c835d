"""Checkpoints: everything but keys comes back, settings must agree, and loading runs no code."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import ConfigurationError, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep, ProtocolError
from privet.accounting import Ledger, Relation
from privet.errors import LedgerError
from privet.training.checkpoint import load, save

DATA = TensorDataset(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))


class Run:
    def __init__(
        self,
        *,
        noise: float = 1.0,
        clip: float = 1.0,
        batch_size: int = 4,
        seed: int | None = None,
        shuffle: bool = False,
        poisson_sampling: bool = True,
        relation: Relation = Relation.ZERO_OUT,
    ) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(2, 1)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.engine = PrivacyEngine(ledger=Ledger(relation=relation, accountant="rdp"))
        *_, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(DATA, batch_size=batch_size, shuffle=shuffle),
            poisson_sampling=poisson_sampling,
            noise_multiplier=noise,
            max_grad_norm=clip,
            noise_generator=None if seed is None else torch.Generator().manual_seed(seed),
        )

    def train(self, steps: int) -> None:
        for (x,) in itertools.islice(self.loader, steps):
            self.step(x)

    def step(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.net(x).square().mean().backward()
        self.optimizer.step()

    def save(self, path: Path, **extra: Any) -> None:
        self.engine.save_checkpoint(path, module=self.net, optimizer=self.optimizer, extra=extra)

    def load(self, path: Path) -> dict[str, Any]:
        return self.engine.load_checkpoint(path, module=self.net, optimizer=self.optimizer)

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ledger": self.engine.ledger.state_dict(),
                "update": self.engine._watched[0].update.state_dict(),
            }
        )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_all_but_the_key_comes_back(tmp_path: Path) -> None:
    first, second = Run(), Run()
    first.train(3)
    first.save(tmp_path / "c.pt", epoch=7)
    assert second.load(tmp_path / "c.pt") == {"epoch": 7}
    saved, loaded = first.state(), second.state()
    for part in ("net", "optimizer", "ledger"):
        assert same(saved[part], loaded[part]), part
    assert second.engine.get_epsilon(1e-5) == first.engine.get_epsilon(1e-5) > 0
    assert second.engine._watched[0].update.steps == 3
    second.train(1)
    assert second.engine.ledger.steps == 4


def test_a_resumed_run_draws_other_noise(tmp_path: Path) -> None:
    first = Run()
    first.train(1)
    first.save(tmp_path / "c.pt")
    runs = [Run(), Run()]
    for run in runs:
        run.load(tmp_path / "c.pt")
    states = []
    for run in runs:
        with pytest.warns(UserWarning, match="did not come"):
            run.step(torch.zeros(3, 2))
        states.append(run.net.weight.detach().clone())
    assert not torch.equal(*states)


def test_no_key_is_in_the_file(tmp_path: Path) -> None:
    run = Run()
    run.train(2)
    run.save(tmp_path / "c.pt")
    content = (tmp_path / "c.pt").read_bytes()
    key = run.engine._watched[0].update.noise.source._key  # type: ignore[attr-defined]
    assert key._secret not in content
    for purpose in ("noise", "sampling"):
        assert key.derive(purpose) not in content


def test_steps_taken_since_the_save_stay_billed(tmp_path: Path) -> None:
    run = Run()
    run.train(2)
    run.save(tmp_path / "c.pt")
    run.train(2)
    before = run.engine.get_epsilon(1e-5)
    run.load(tmp_path / "c.pt")
    assert run.engine.get_epsilon(1e-5) == before
    assert run.engine._watched[0].update.steps == 4
    run.train(1)
    assert run.engine.ledger.steps == 5


@pytest.mark.filterwarnings("ignore:a step was taken on a batch")
def test_a_reproducible_run_never_meets_its_noise_twice_in_one_process(tmp_path: Path) -> None:
    run = Run(seed=3)
    run.train(1)
    run.save(tmp_path / "c.pt")
    noise = []
    for _ in range(2):
        run.load(tmp_path / "c.pt")
        run.step(torch.zeros(3, 2))
        noise.append(run.net.bias.grad.clone())
    assert not torch.equal(*noise)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"noise": 2.0}, "multiplier=2.0"), ({"clip": 0.5}, r"clip_norm=0\.5"), ({"batch_size": 2}, r"rate=0\.125")],
)
def test_other_settings_are_refused_by_name_and_change_nothing(
    tmp_path: Path, settings: dict[str, Any], word: str
) -> None:
    first, second = Run(), Run(**settings)
    first.train(2)
    second.train(1)
    first.save(tmp_path / "c.pt")
    before = second.state()
    with pytest.raises(ConfigurationError, match=word):
        second.load(tmp_path / "c.pt")
    assert same(before, second.state())


def test_steps_taken_before_the_checkpoint_of_another_run_is_loaded_are_paid_for_too(tmp_path: Path) -> None:
    first, second = Run(), Run()
    first.train(3)
    first.save(tmp_path / "c.pt")
    second.train(2)
    for _ in range(2):
        second.load(tmp_path / "c.pt")
        assert second.engine.ledger.steps == 5


def test_a_checkpoint_of_another_relation_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first, second = Run(), Run(relation=Relation.REPLACE_ONE)
    first.train(2)
    first.save(tmp_path / "c.pt")
    with pytest.warns(UserWarning, match="did not come"):
        second.step(torch.zeros(3, 2))
    before = second.state()
    with pytest.raises(LedgerError):
        second.load(tmp_path / "c.pt")
    assert same(before, second.state())


def test_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first, second = Run(), Run()
    first.train(2)
    first.save(tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    state["module"]["weight"] = torch.zeros(5, 2)
    torch.save(state, tmp_path / "d.pt")
    before = second.state()
    with pytest.raises(ConfigurationError, match=r"weight: saved \(5, 2\), now \(1, 2\)"):
        second.load(tmp_path / "d.pt")
    assert same(before, second.state())


def test_a_file_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": 1, "evil": Evil()}, tmp_path / "c.pt")
    with pytest.raises((ConfigurationError, pickle.UnpicklingError)):
        Run().load(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "c.pt")
    with pytest.raises(ConfigurationError, match="not a checkpoint"):
        Run().load(tmp_path / "c.pt")


def test_a_save_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path / "c.pt", epoch=1)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        run.save(tmp_path / "c.pt", bad=lambda: None)
    assert Run().load(tmp_path / "c.pt") == {"epoch": 1}


def test_a_module_that_is_not_private_has_no_checkpoint(tmp_path: Path) -> None:
    net = nn.Linear(2, 1)
    with pytest.raises(ProtocolError, match="make_private first"):
        Run().engine.save_checkpoint(tmp_path / "c.pt", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    assert not (tmp_path / "c.pt").exists()


def test_a_resumed_run_draws_its_batches_afresh(tmp_path: Path) -> None:
    first, second = Run(), Run()
    seen: list[list[list[int]]] = [[], []]
    for run, batches in zip((first, second), seen, strict=True):
        run.loader.on_batch(lambda ticket, run=run, batches=batches: batches.append(
            run.loader._batches.examples(ticket.passes, ticket.index)
        ))  # fmt: skip
    first.train(3)
    first.save(tmp_path / "c.pt")
    second.load(tmp_path / "c.pt")
    for _ in range(4):
        first.train(4)
        second.train(4)
    assert seen[0][3:] != seen[1], "a fresh key; by chance the same once in many millions"
    assert first.engine.ledger.phases == second.engine.ledger.phases, "all steps, and no more"


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_partition_begins_a_new_pass_and_pays_for_it(tmp_path: Path, shuffle: bool) -> None:
    def run_of() -> Run:
        return Run(poisson_sampling=False, shuffle=shuffle)

    first, second = run_of(), run_of()
    first.train(2)  # half of a pass
    assert first.engine.ledger.steps == 1
    first.save(tmp_path / "c.pt")
    second.load(tmp_path / "c.pt")
    assert second.engine.ledger.steps == 1
    second.train(4)
    assert second.engine.ledger.steps == 2, "an example of the first half may have taken part twice"
    assert second.loader.passes_begun == 1


def test_a_pass_that_goes_on_after_a_resume_in_one_process_is_billed_again(tmp_path: Path) -> None:
    run = Run(poisson_sampling=False)
    run.save(tmp_path / "c.pt")
    batches = iter(run.loader)
    run.step(next(batches)[0])
    assert run.engine.ledger.steps == 1
    run.load(tmp_path / "c.pt")
    run.step(next(batches)[0])
    run.step(next(batches)[0])
    assert run.engine.ledger.steps == 2


def test_the_explicit_door_saves_and_resumes(tmp_path: Path) -> None:
    def made() -> PrivateStep:
        net = nn.Linear(2, 1)
        return PrivateStep(
            net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.0), steps=3),
            loss_per_example=lambda m, b: m(b[0])[:, 0],
            expected_batch_size=4,
        )

    first, second = made(), made()
    for batch in first.batches(DATA):
        first(batch)
    parts = [
        {"module": s.model, "optimizer": s.optimizer, "ledger": s.ledger, "updates": [s._update]}
        for s in (first, second)
    ]
    save(tmp_path / "c.pt", **parts[0])
    load(tmp_path / "c.pt", **parts[1])
    assert same(first.model.state_dict(), second.model.state_dict())
    assert second.ledger.steps == 3
