"""Accelerate's loop trains as the plain one does: the same sums, the same ε, however it is interrupted."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine
from privet.errors import ConfigurationError, ProtocolError
from privet.integrations.accelerate import prepare

N, BATCH, DELTA = 48, 12, 1e-5


def data(batch_size=None):
    drawn = torch.Generator().manual_seed(5)
    return DataLoader(
        TensorDataset(torch.randn(N, 3, generator=drawn), torch.randint(2, (N,), generator=drawn)),
        batch_size=batch_size or BATCH,
    )


def parts():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def options(**more):
    return {"noise_multiplier": 1.0, "max_grad_norm": 0.7, "noise_generator": torch.Generator().manual_seed(7), **more}


def accelerator(**settings):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **settings)


class Run:
    """A loop as its user writes it for Accelerate."""

    def __init__(self, settings=None, batch_size=None, **more):
        self.accelerator, self.engine = accelerator(**(settings or {})), PrivacyEngine()
        model, optimizer = parts()
        self.model, self.optimizer, self.loader = prepare(
            self.accelerator,
            self.engine,
            module=model,
            optimizer=optimizer,
            data_loader=data(batch_size),
            **options(**more),
        )
        # Accelerate steps it once for each process.
        each = torch.optim.lr_scheduler.StepLR(optimizer, 4 * self.accelerator.num_processes, gamma=0.5)
        self.scheduler = self.accelerator.prepare(each)

    def train(self, *, most=None, left=None):
        """Takes a pass, or `most` batches of it; `left` batches are left of one that is resumed."""
        batches, end = 0, len(self.loader) if left is None else left
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(F.cross_entropy(self.model(x), y))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            batches += 1
            assert self.accelerator.gradient_state.end_of_dataloader == (batches == end)
            if batches == most:
                return
        assert batches == end

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def by_hand(passes, *, autocast=False, **more):
    engine = PrivacyEngine()
    model, optimizer = parts()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=data(), **options(**more)
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    for _ in range(passes):
        for x, y in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                outputs = model(x)
            F.cross_entropy(outputs.float(), y).backward()
            optimizer.step()
            scheduler.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), engine.get_epsilon(DELTA)


@pytest.fixture(scope="module")
def two_passes():
    return by_hand(2)


def test_the_same_key_gives_the_weights_and_the_epsilon_of_the_plain_loop(two_passes):
    run = Run()
    run.train()
    run.train()
    torch.testing.assert_close(run.weights(), two_passes[0], rtol=1e-5, atol=1e-6)
    assert run.engine.get_epsilon(DELTA) == two_passes[1]
    assert run.engine.ledger.steps == 8
    assert run.engine.ledger.marks == ("reproducible key",)


def test_in_bfloat16_without_noise_the_weights_are_those_of_the_plain_loop():
    run = Run({"mixed_precision": "bf16"}, noise_multiplier=0.0)
    run.train()
    torch.testing.assert_close(run.weights(), by_hand(1, autocast=True, noise_multiplier=0.0)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("most", [None, 2], ids=["between passes", "inside of a pass"])
def test_a_resumed_run_goes_on_with_its_weights_its_batches_and_its_epsilon(tmp_path, most, two_passes):
    first = Run()
    first.train(most=most)
    first.accelerator.save_state(tmp_path)
    first.train(most=1)  # what is not in the checkpoint is not in the resumed run
    resumed = Run()
    resumed.accelerator.load_state(tmp_path)
    assert resumed.engine.ledger.steps == (most or 4)
    if most is not None:
        resumed.train(left=4 - most)
    resumed.train()
    torch.testing.assert_close(resumed.weights(), two_passes[0], rtol=1e-5, atol=1e-6)
    assert resumed.engine.get_epsilon(DELTA) == pytest.approx(two_passes[1], abs=2e-3)


def test_accumulated_batches_are_parts_of_one_step_also_after_a_pass_that_was_left_inside_of_one(two_passes):
    run = Run({"gradient_accumulation_steps": 2}, batch_size=BATCH // 2)
    run.train()
    run.train()
    torch.testing.assert_close(run.weights(), two_passes[0], rtol=1e-5, atol=1e-6)
    assert run.engine.get_epsilon(DELTA) == two_passes[1]
    run.train(most=3)
    run.train()
    assert run.engine.ledger.steps == 8 + 1 + 4


def test_a_pass_that_is_left_early_costs_its_steps_and_the_next_begins_anew():
    run = Run()
    run.train(most=1)
    assert not run.accelerator.gradient_state.in_dataloader
    run.train()
    assert run.engine.ledger.steps == 5


def test_the_target_is_the_budget():
    run = Run(noise_multiplier=None, target_epsilon=2.0, target_delta=DELTA, epochs=2)
    run.train()
    run.train()
    assert 1.9 < run.engine.get_epsilon(DELTA) <= 2.0
    assert run.engine.budget.epsilon == 2.0


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_was_prepared_before_is_refused_at_both_calls():
    ready = accelerator()
    model, optimizer = parts()
    loader = data()
    _, prepared, shard = ready.prepare(model, optimizer, loader)
    with pytest.raises(
        ConfigurationError, match=r"^module, optimizer, data_loader: prepared before.* in the place of "
    ):
        prepare(ready, PrivacyEngine(), module=model, optimizer=prepared, data_loader=shard, **options())
    plain = {"module": model, "optimizer": optimizer, "data_loader": loader}
    for name, found in {"optimizer": prepared, "data_loader": shard}.items():
        with pytest.raises(
            ConfigurationError, match=r"prepared by accelerate before.*integrations\.accelerate\.prepare"
        ):
            PrivacyEngine().make_private(**{**plain, name: found}, **options())


def test_a_private_loader_that_is_built_anew_from_its_parts_is_refused_with_the_lines_to_write():
    ready = accelerator()
    model, optimizer = parts()
    _, _, loader = PrivacyEngine().make_private(module=model, optimizer=optimizer, data_loader=data(), **options())
    for rebuilt in (ready.prepare(loader), ready.skip_first_batches(loader, 1)):
        with pytest.raises(ProtocolError, match=r"built anew.*from privet.integrations.accelerate import prepare`"):
            next(iter(rebuilt))
    run = Run()
    with pytest.raises(ProtocolError, match=r"load_state puts it back.*leave skip_first_batches away"):
        run.accelerator.skip_first_batches(run.loader, 1)


def test_what_is_prepared_may_be_given_to_the_accelerator_again():
    run = Run()
    given = (run.model, run.optimizer, run.loader)
    assert run.accelerator.prepare(*given) == given


@pytest.fixture
def halved(monkeypatch):
    """Makes Accelerate's fp16 run on a CPU: it gives a scaler to GPUs alone."""
    made = Accelerator.__init__

    def on_a_cpu(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    monkeypatch.setattr(Accelerator, "__init__", on_a_cpu)


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step... has been overridden:UserWarning")  # by Accelerate
@pytest.mark.parametrize("parts", [1, 2])
def test_the_scale_of_the_loss_cancels_before_norms_are_taken(halved, parts, monkeypatch):
    def weights_of(**settings):
        run = Run(settings={"gradient_accumulation_steps": parts}, batch_size=BATCH // parts, **settings)
        run.train()
        assert not run.optimizer.step_was_skipped
        return run.weights(), run.engine.get_epsilon(DELTA)

    scaled = weights_of()
    monkeypatch.undo()
    plain = weights_of()
    torch.testing.assert_close(scaled[0], plain[0], rtol=1e-5, atol=1e-6)
    assert scaled[1] == plain[1]


def test_settings_of_the_accelerator(monkeypatch):
    model, optimizer = parts()
    plain = {"module": model, "optimizer": optimizer, "data_loader": data()}
    ready = accelerator()
    with pytest.raises(ConfigurationError, match="Leave accumulate= away"):
        prepare(ready, PrivacyEngine(), **plain, **options(), accumulate=2)
    monkeypatch.setattr(ready, "scaler", torch.amp.GradScaler("cpu", init_scale=1000.0))
    with pytest.raises(ConfigurationError, match="does not cancel without rounding"):
        prepare(ready, PrivacyEngine(), **plain, **options())
    monkeypatch.setattr(Accelerator, "distributed_type", "FSDP")
    with pytest.raises(ConfigurationError, match=r"set to FSDP.*fully_shard"):
        prepare(ready, PrivacyEngine(), **plain, **options())
