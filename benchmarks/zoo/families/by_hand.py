"""The cases of architectures as people write them themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from benchmarks.zoo.case import CLASSES, Batch, Case, Size, by_class, floats, images, labels
from benchmarks.zoo.families import networks as own


def _sequences(n: int, s: Size) -> Batch:
    return torch.randn(n, s.positions, 6), labels(n)


def _wrapped(wrap: str) -> nn.Module:
    utils, layer = nn.utils, nn.Linear(8, 8)
    if wrap == "pruned":
        prune.random_unstructured(layer, "weight", 0.4)
    else:
        home = utils if wrap.endswith("old") else utils.parametrizations
        layer = getattr(home, wrap.split(maxsplit=1)[0])(layer)
    return _settled(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), layer, nn.Tanh(), nn.Linear(8, CLASSES)), torch.randn(1, 8)
    )


def _settled(model: nn.Module, x: Tensor) -> nn.Module:
    """Returns the model after forwards in which the vectors of spectral normalization have come to rest."""
    model.double()
    with torch.no_grad():
        for _ in range(300):
            model(x.double())
    return model


def _cnn(s: Size) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, 2),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.1),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.InstanceNorm2d(8, affine=True),
        nn.PReLU(8),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )


def _lazy_done(s: Size) -> nn.Module:
    model = _cnn(s)
    model(images(2, s)[0])
    return model


def _mlp(s: Size) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def _pairs(n: int, s: Size) -> Batch:
    return torch.randn(n, 6), torch.randn(n, 6), torch.randint(2, (n,))


def _alike(model: nn.Module, batch: Batch) -> Tensor:
    return (model(*batch[:2]) - batch[2]).square()


def cases() -> list[Case]:
    """Returns the cases of this family."""
    flat = floats(8)
    return [
        Case("MLP", _mlp, flat, by_class),
        Case("CNN", _lazy_done, images, by_class),
        Case("DLRM", lambda s: own.Recommender(), own.clicks, own.by_click),
        Case("wide and deep", lambda s: own.WideAndDeep(), own.clicks, own.by_click),
        Case("TCN", lambda s: own.Temporal(), lambda n, s: (torch.randn(n, 3, s.positions), labels(n)), by_class),
        Case("U-Net", lambda s: own.UNet(), own.scenes, own.by_pixel),
        Case(
            "GAN generator",
            lambda s: _settled(own.Generator(), torch.randn(1, 8)),
            lambda n, s: (torch.randn(n, 8),),
            lambda m, b: F.softplus(-m(b[0])),
        ),
        Case(
            "GAN critic",
            lambda s: _settled(own.critic(), torch.randn(1, 3, 8, 8)),
            lambda n, s: (torch.randn(n, 3, 8, 8), torch.randint(2, (n,))),
            own.by_click,
            note="spectral normalization writes its vectors in each forward, from the weights alone",
        ),
        Case("VAE", lambda s: own.Autoencoder(), lambda n, s: (torch.randn(n, 12),), own.by_evidence),
        Case("ODE loop", lambda s: own.Ode(), floats(4), by_class),
        Case("siamese", lambda s: own.Siamese(), _pairs, _alike),
        Case("siamese, joined", lambda s: own.Siamese(joined=True), _pairs, _alike),
        Case("hypernetwork", lambda s: own.HyperNetwork(), flat, by_class),
        Case("hypernetwork, shared", lambda s: own.SharedHyperNetwork(), flat, by_class),
        Case("experts by einsum", lambda s: own.Experts(), flat, by_class),
        Case("prototypes by cdist", lambda s: own.Prototypes(), flat, by_class),
        Case("attention pooling", lambda s: own.Pooled(), _sequences, by_class),
        Case("attention pooling without bias", lambda s: own.Pooled(bias=False), _sequences, by_class),
        Case("TransformerEncoder, batch second", own.BatchSecond, _sequences, by_class),
        Case(
            "adaptive softmax",
            own.Adaptive,
            lambda n, s: (torch.randint(s.words, (n, 8)), torch.randint(s.words, (n,))),
            lambda m, b: F.nll_loss(m(b[0]), b[1], reduction="none"),
        ),
        Case("multi-crop", lambda s: own.MultiCrop(), images, by_class),
        Case("ParameterList and ParameterDict", lambda s: own.Lists(), flat, by_class),
        Case(
            "Fourier layer of real parameters",
            lambda s: own.Fourier(),
            lambda n, s: (torch.randn(n, 3, s.positions), labels(n)),
            by_class,
        ),
        Case("relative bias by a table", own.Relative, _sequences, by_class),
        *(
            Case(name, lambda s, name=name: _wrapped(name), flat, by_class)
            for name in ("weight_norm", "weight_norm old", "spectral_norm", "spectral_norm old", "orthogonal", "pruned")
        ),
    ]
