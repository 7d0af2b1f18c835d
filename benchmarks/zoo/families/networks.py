"""Networks as people write them themselves, with batches and losses for some."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.case import CLASSES, Batch, Size, classified


class Recommender(nn.Module):
    """DLRM: a bag of entries for each field, a network for numbers, and the products of all pairs."""

    def __init__(self, fields: int = 3, width: int = 4) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, width, mode="sum") for _ in range(fields))
        self.bottom = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, width))
        pairs = (fields + 1) * fields // 2
        self.top = nn.Sequential(nn.Linear(pairs + width, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, numbers: Tensor, entries: Tensor) -> Tensor:  # (B, 5), (B, fields, L) -> (B,)
        dense = self.bottom(numbers)
        parts = torch.stack([dense, *(bag(entries[:, f]) for f, bag in enumerate(self.bags))], 1)
        products = parts @ parts.mT
        i, j = torch.triu_indices(parts.shape[1], parts.shape[1], 1)
        found: Tensor = self.top(torch.cat([dense, products[:, i, j]], 1)).squeeze(1)
        return found


def clicks(n: int, s: Size) -> Batch:
    """Returns numbers, entries of three fields, and whether there was a click."""
    return torch.randn(n, 5), torch.randint(20, (n, 3, 4)), torch.randint(2, (n,))


def by_click(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the logistic loss of each example."""
    logits = model(*batch[:-1])
    return F.binary_cross_entropy_with_logits(logits, batch[-1].to(logits.dtype), reduction="none")


class WideAndDeep(nn.Module):
    """A linear model of crossed entries beside a deep one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tables = nn.Embedding(400, 1), nn.ModuleList(nn.Embedding(20, 4) for _ in range(3))
        self.deep = nn.Sequential(nn.Linear(5 + 12, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, numbers: Tensor, entries: Tensor) -> Tensor:
        one = entries[..., 0]
        crossed = torch.stack([one[:, 0] * 20 + one[:, 1], one[:, 1] * 20 + one[:, 2]], 1)
        embedded = [table(one[:, f]) for f, table in enumerate(self.tables)]
        deep = self.deep(torch.cat([numbers, *embedded], 1))
        return (self.wide(crossed).sum(1) + deep).squeeze(1)


class TemporalBlock(nn.Module):
    """A block of a temporal convolutional network: dilated causal convolutions under weight normalization."""

    def __init__(self, ins: int, outs: int, dilation: int) -> None:
        super().__init__()
        wn = nn.utils.parametrizations.weight_norm
        self.first = wn(nn.Conv1d(ins, outs, 3, dilation=dilation))
        self.second = wn(nn.Conv1d(outs, outs, 3, dilation=dilation))
        self.dropout, self.skip, self.pad = nn.Dropout(0.1), nn.Conv1d(ins, outs, 1), 2 * dilation

    def forward(self, x: Tensor) -> Tensor:  # (B, I, T) -> (B, O, T)
        h = x
        for layer in (self.first, self.second):
            h = self.dropout(F.relu(layer(F.pad(h, (self.pad, 0)))))
        return F.relu(h + self.skip(x))


class Temporal(nn.Module):
    """A temporal convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(TemporalBlock(3, 8, 1), TemporalBlock(8, 8, 2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(x)[..., -1])
        return found


class UNet(nn.Module):
    """Down and up again, with what was there on the way down."""

    def __init__(self) -> None:
        super().__init__()

        def block(ins: int, outs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1), nn.GroupNorm(2, outs), nn.SiLU(inplace=True))

        self.first, self.second, self.middle = block(3, 4), block(4, 8), block(8, 8)
        self.up, self.last, self.head = nn.ConvTranspose2d(8, 4, 2, 2), block(8, 4), nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, P, P) -> (B, classes, P, P)
        one = self.first(x)
        two = self.middle(self.second(F.max_pool2d(one, 2)))
        found: Tensor = self.head(self.last(torch.cat([self.up(two), one], 1)))
        return found


def scenes(n: int, s: Size) -> Batch:
    """Returns images, and a class for each of their pixels."""
    return torch.randn(n, 3, 16, 16), torch.randint(CLASSES, (n, 16, 16))


def by_pixel(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the cross entropy of each example's pixels."""
    return classified(model(batch[0]).movedim(1, -1), batch[1])


class Generator(nn.Module):
    """The half of a GAN that draws: trained here through a critic that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.draw = nn.Sequential(
            nn.ConvTranspose2d(8, 8, 4), nn.GroupNorm(2, 8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()
        )
        self.critic = critic().requires_grad_(requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        found: Tensor = self.critic(self.draw(z[..., None, None]))
        return found


def critic() -> nn.Sequential:
    """Returns the half of a GAN that judges."""
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 1), nn.Flatten(0)
    )


class Autoencoder(nn.Module):
    """A variational autoencoder, whose noise is drawn for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(12, 8), nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decode(z), mean, log_variance


def by_evidence(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the negative lower bound of the evidence."""
    seen, mean, log_variance = model(batch[0])
    apart = (seen - batch[0]).square().sum(1)
    return apart + (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


class Ode(nn.Module):
    """A differential equation, by the classical method of Runge and Kutta: one network used 16 times."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.head = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = 0.25
        for _ in range(4):
            a = self.field(x)
            b = self.field(x + h / 2 * a)
            c = self.field(x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + self.field(x + h * c))
        found: Tensor = self.head(x)
        return found


class Siamese(nn.Module):
    """Two inputs of one example by one network."""

    def __init__(self, *, joined: bool = False) -> None:
        super().__init__()
        self.tower, self.joined = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8)), joined

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.joined:
            first, second = self.tower(torch.cat([a, b])).chunk(2)
        else:
            first, second = self.tower(a), self.tower(b)
        return F.cosine_similarity(first, second)


class HyperNetwork(nn.Module):
    """A network that makes the weights of another one, for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.head = nn.Linear(3, 4 * 5), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.maker(x[:, :3]).view(-1, 4, 5)
        found: Tensor = self.head(torch.tanh(torch.einsum("boi,bi->bo", weights, x[:, 3:])))
        return found


class SharedHyperNetwork(nn.Module):
    """The weights of a layer, made of a learned code that belongs to no example."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.maker, self.head = nn.Parameter(torch.randn(3)), nn.Linear(3, 4 * 8), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(F.linear(x, self.maker(self.code).view(4, 8))))
        return found


class Experts(nn.Module):
    """Every expert sees every example, by one product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 6) / 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.einsum("bi,eio->beo", x, self.experts)
        found: Tensor = self.head(torch.tanh((self.gate(x).softmax(-1).unsqueeze(-1) * each).sum(1)))
        return found


class Prototypes(nn.Module):
    """Distances to learned points."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.points = nn.Linear(8, 5), nn.Parameter(torch.randn(CLASSES, 5))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.embed(x), self.points)


class Pooled(nn.Module):
    """Attention pooling: one score for each position."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.score = nn.Linear(6, 8), nn.Linear(8, 1, bias=bias)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 6)
        h = torch.tanh(self.embed(x))
        found: Tensor = self.head((self.score(h).softmax(1) * h).sum(1))
        return found


class BatchSecond(nn.Module):
    """torch's encoder in its own order, positions first, inside of a model whose batch is first."""

    def __init__(self, s: Size, activation: str = "relu") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(s.width, s.heads, 2 * s.width, activation=activation)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.head = nn.Linear(6, s.width), nn.Linear(s.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(self.embed(x).transpose(0, 1)).mean(0))
        return found


class Adaptive(nn.Module):
    """torch's adaptive softmax over many words."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(s.words, 8), nn.AdaptiveLogSoftmaxWithLoss(8, s.words, [10, 25])

    def forward(self, x: Tensor) -> Tensor:
        return self.out.log_prob(self.table(x).mean(1))


class MultiCrop(nn.Module):
    """Views of one example, by one encoder, each apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        views = [x, x.flip(-1), x[..., 4:-4, 4:-4]]
        found: Tensor = self.head(torch.stack([self.encode(v) for v in views]).mean(0))
        return found


class Lists(nn.Module):
    """Bare parameters in a list and in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ParameterList(nn.Parameter(torch.randn(8, 8) / 3) for _ in range(3))
        self.parts = nn.ParameterDict({"scale": nn.Parameter(torch.ones(8)), "out": nn.Parameter(torch.randn(8, 3))})

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.tanh(x @ step) * self.parts["scale"]
        return x @ self.parts["out"]


class Fourier(nn.Module):
    """A Fourier layer with real parameters for its complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 4, 5))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, T)
        modes = torch.fft.rfft(x)[..., :5]
        a, b = modes.real, modes.imag
        real = torch.einsum("bit,iot->bot", a, self.real) - torch.einsum("bit,iot->bot", b, self.imaginary)
        imaginary = torch.einsum("bit,iot->bot", a, self.imaginary) + torch.einsum("bit,iot->bot", b, self.real)
        found: Tensor = self.head(torch.fft.irfft(torch.complex(real, imaginary), n=x.shape[-1]).square().mean(-1))
        return found


class Relative(nn.Module):
    """Attention with a learned bias for each distance, by a table looked up with a matrix of places."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.mix, self.bias = nn.Linear(6, 3 * s.width), nn.Parameter(torch.randn(2 * s.positions - 1, s.heads))
        self.head, self.heads = nn.Linear(s.width, CLASSES), s.heads

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 6)
        n, t, _ = x.shape
        q, k, v = self.mix(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        place = torch.arange(t)
        bias = self.bias[place[:, None] - place + t - 1].permute(2, 0, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        found: Tensor = self.head(mixed.transpose(1, 2).flatten(2).mean(1))
        return found
