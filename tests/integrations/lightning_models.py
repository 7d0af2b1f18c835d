"""Small LightningModules, and the loop that does by hand what Lightning does with them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine

N, BATCH = 48, 12
DELTA = 1e-5


def data():
    drawn = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(N, 3, generator=drawn), torch.randint(2, (N,), generator=drawn))


def loader(batch_size=BATCH, **options):
    return DataLoader(data(), batch_size=batch_size, **options)


def seed():
    return torch.Generator().manual_seed(7)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def optimized(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


class Classifier(pl.LightningModule):
    """Two layers; `manual` steps its optimizer itself; `direct` calls its net and not itself."""

    def __init__(self, *, manual=False, direct=False):
        super().__init__()
        self.net = net()
        self.automatic_optimization = not manual
        self.direct = direct

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy((self.net if self.direct else self)(x), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()
        return None

    def configure_optimizers(self):
        optimizer, scheduler = optimized(self.parameters())
        return [optimizer], [scheduler]


class Validated(Classifier):
    """Looks at other data after each epoch."""

    validations = 0

    def validation_step(self, batch, batch_idx):
        self.validations += 1
        F.cross_entropy(self(batch[0]), batch[1])


def trainer(*callbacks, **options):
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


class Plain(nn.Module):
    """The same parameters under the same names, by which noise is drawn."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)


def by_hand(epochs, *, kind=Plain, autocast=False, **options):
    """Returns the parameters and ε of the hand-written loop with the same key."""
    model, engine = kind(), PrivacyEngine()
    optimizer, scheduler = optimized(model.parameters())
    model, optimizer, batches = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader(), max_grad_norm=0.7, noise_generator=seed(), **options
    )
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        scheduler.step()
    return flat(model), engine.get_epsilon(DELTA)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
