"""What does not go with private training in Lightning is refused before anything is trained, with what to write."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import WeightedRandomSampler

from privet import PrivacyEngine, ProtocolError
from privet.errors import ConfigurationError
from privet.integrations import lightning_trainer, needed
from privet.integrations.lightning import PrivateTraining
from tests.integrations.lightning_models import Classifier, N, flat, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated"),
]


def private(**options):
    return PrivateTraining(**{"noise_multiplier": 1.0, "max_grad_norm": 0.7, **options})


def refused(match, *, model=None, batches=None, also=(), settings=None, **options):
    model = Classifier() if model is None else model
    before = flat(model)
    with pytest.raises(ConfigurationError, match=match):
        trainer(private(**options), *also, max_epochs=1, **(settings or {})).fit(
            model, loader() if batches is None else batches
        )
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize(
    ("match", "settings"),
    [
        ("gradient_clip_val=1.0 would have no effect.* max_grad_norm", {"gradient_clip_val": 1.0}),
        ("overfit_batches", {"overfit_batches": 2}),
        ("reload_dataloaders", {"reload_dataloaders_every_n_epochs": 1}),
        ("by 'spawn'.*the ledger with them.*strategy='ddp'", {"strategy": "ddp_spawn"}),
        ("by 'fork'", {"strategy": "ddp_notebook"}),
        ("communication hook", {"strategy": DDPStrategy(ddp_comm_state=object())}),
    ],
    ids=["gradient_clip_val", "overfit", "reload", "spawn", "notebook", "comm hook"],
)
def test_a_setting_of_the_trainer(match, settings):
    with pytest.raises(ConfigurationError, match=match):
        lightning_trainer.refuse_trainer(trainer(**settings))


@pytest.mark.parametrize(
    "callback",
    [callbacks.BatchSizeFinder(), callbacks.LearningRateFinder(), callbacks.GradientAccumulationScheduler({0: 2})],
    ids=lambda callback: type(callback).__name__,
)
def test_a_callback_that_trains_or_changes_the_steps(callback):
    with pytest.raises(ConfigurationError, match=rf"{type(callback).__name__} is among the callbacks.*Remove it"):
        lightning_trainer.refuse_trainer(trainer(callback))


def test_what_the_trainer_is_set_to_is_looked_at_before_anything_is_made_private():
    refused("gradient_clip_val", settings={"gradient_clip_val": 1.0})


def test_the_trainer_of_another_package():
    with pytest.raises(ConfigurationError, match=r"import lightning\.pytorch as pl"):
        lightning_trainer.refuse_trainer(object())


def test_loaders_that_are_not_one_plain_loader():
    refused("a dict. Expected one torch DataLoader", batches={"a": loader(), "b": loader()})
    refused("WeightedRandomSampler", batches=loader(sampler=WeightedRandomSampler([1.0] * N, N)))
    model = Classifier()
    _, _, made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    refused("made private before. Give Trainer.fit the loader", batches=made)


class TwoOptimizers(Classifier):
    def __init__(self):
        super().__init__(manual=True)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


class TwoParts(Classifier):
    forward = Classifier.__mro__[1].forward  # that of LightningModule, which a module without one has

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(2, 2)


def test_modules_of_which_it_is_not_known_what_is_trained_how():
    refused("2 optimizers. Expected one", model=TwoOptimizers())
    refused(r"2 parts that are trained: net, other.*Write a forward", model=TwoParts())


def test_arguments_that_do_not_fit_together():
    for match, options in {
        "one of the two": {"target_epsilon": 1.0, "target_delta": 1e-5},
        "Leave epochs= away": {"epochs": 2},
        "noise_multiplier must be": {"noise_multiplier": -1.0},
        "needs target_delta=": {"noise_multiplier": None, "target_epsilon": 1.0},
    }.items():
        with pytest.raises(ConfigurationError, match=match):
            private(**options)
    with pytest.raises(TypeError, match=r"unknown options: max_grad_nrm. Expected some of .*max_grad_norm"):
        private(max_grad_nrm=1.0)


def test_accumulation_is_said_once_and_ends_with_the_epoch():
    refused("accumulate_grad_batches=", accumulate=2)
    refused("after 3 batches, in the middle", settings={"accumulate_grad_batches": 2, "limit_train_batches": 3})


def test_a_target_without_a_number_of_epochs():
    with pytest.raises(ConfigurationError, match=r"nothing says how many.*epochs="):
        trainer(private(noise_multiplier=None, target_epsilon=1.0, target_delta=1e-5), max_epochs=-1).fit(
            Classifier(), loader()
        )


def test_a_second_fit_of_one_module_says_how_to_go_on():
    callback, model = private(), Classifier()
    trainer(callback, max_epochs=1).fit(model, loader())
    with pytest.raises(ProtocolError, match="made private before") as raised:
        trainer(callback, max_epochs=1).fit(model, loader())
    assert any("PrivateTraining(engine=...)" in note for note in raised.value.__notes__)
    other = Classifier()
    other.load_state_dict(model.state_dict())
    trainer(private(engine=callback.engine), max_epochs=1).fit(other, loader())
    assert callback.engine.ledger.steps == 8


def test_what_is_missing_or_too_old_is_one_line_that_names_the_extra(monkeypatch):
    with pytest.raises(
        ImportError, match=r"^privet needs nothing_such 2.2 or newer here, and found none: pip install "
    ):
        needed.need("nothing_such", "2.2", extra="lightning")
    monkeypatch.setattr("lightning.__version__", "2.1.9")
    with pytest.raises(ImportError, match=r"found 2.1.9: pip install 'privet\[lightning\]'$"):
        needed.need("lightning", "2.2", extra="lightning")
    monkeypatch.setattr("lightning.__version__", "2.10.0.dev20260101")
    needed.need("lightning", "2.2", extra="lightning")
