"""Recurrent networks, as modules and as loops over cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import CLASSES, Batch, Case, Size, by_class, classified, labels, pair


class Read(nn.Module):
    """A recurrent module of torch, and a head at its last position."""

    def __init__(self, kind: str, s: Size, **settings: object) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(6, s.width, batch_first=True, **settings)
        self.head = nn.LazyLinear(CLASSES)
        self.head(self.rnn(torch.randn(1, 2, 6))[0])

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 6)
        found: Tensor = self.head(self.rnn(x)[0][:, -1])
        return found


class Cells(nn.Module):
    """A loop over one cell."""

    def __init__(self, kind: str, s: Size) -> None:
        super().__init__()
        self.cell, self.head, self.width = getattr(nn, kind)(6, s.width), nn.Linear(s.width, CLASSES), s.width

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        found: Tensor = self.head(state[0] if isinstance(state, tuple) else state)
        return found


class Translator(nn.Module):
    """An LSTM that reads, and a loop over a cell that writes with attention on what was read."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.table, self.reader = nn.Embedding(s.words, 8), nn.LSTM(8, s.width, batch_first=True, bidirectional=True)
        self.writer, self.ask = nn.LSTMCell(8 + 2 * s.width, s.width), nn.Linear(s.width, 2 * s.width)
        self.start, self.out, self.drop = nn.Linear(2 * s.width, s.width), nn.Linear(s.width, s.words), nn.Dropout(0.1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read, _ = self.reader(self.drop(self.table(source)))
        h = torch.tanh(self.start(read.mean(1)))
        c, written = torch.zeros_like(h), []
        for t in range(target.shape[1]):
            weights = torch.einsum("btd,bd->bt", read, self.ask(h)).softmax(-1)
            context = torch.einsum("bt,btd->bd", weights, read)
            h, c = self.writer(torch.cat([self.table(target[:, t]), context], 1), (h, c))
            written.append(self.out(h))
        return torch.stack(written, 1)


class ConvLSTM(nn.Module):
    """A long short-term memory whose products are convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.head = nn.Conv2d(3 + 4, 16, 3, padding=1), nn.Linear(4, CLASSES)
        self.peephole = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 3, P, P)
        h = c = x.new_zeros(x.shape[0], 4, *x.shape[-2:])
        for t in range(x.shape[1]):
            i, f, g, o = self.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            c = (f + self.peephole * c).sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        found: Tensor = self.head(h.mean((2, 3)))
        return found


class Crf(nn.Module):
    """A conditional random field over tags, on top of an embedding: a table that is looked up in two dimensions."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.table, self.score = nn.Embedding(s.words, 8), nn.Linear(8, CLASSES)
        self.follow = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def forward(self, words: Tensor, tags: Tensor) -> Tensor:  # (B, T), (B, T) -> (B,)
        scores = self.score(self.table(words))
        path = scores.gather(2, tags[..., None]).squeeze(2).sum(1) + self.follow[tags[:, :-1], tags[:, 1:]].sum(1)
        total = scores[:, 0]
        for t in range(1, words.shape[1]):
            total = (total[:, :, None] + self.follow).logsumexp(1) + scores[:, t]
        return total.logsumexp(1) - path


def _tagged(n: int, s: Size) -> Batch:
    return torch.randint(s.words, (n, s.positions)), torch.randint(CLASSES, (n, s.positions))


def _sequences(n: int, s: Size) -> Batch:
    return torch.randn(n, 8, 6), labels(n)


class Highway(nn.Module):
    """A gated linear recurrence with parameters for its decay, by cumulative sums."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.put, self.decay, self.head = (
            nn.Linear(6, s.width),
            nn.Parameter(torch.zeros(s.width)),
            nn.Linear(s.width, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        found: Tensor = self.head((self.put(x) * torch.exp(-self.decay.sigmoid() * t)).cumsum(1)[:, -1].tanh())
        return found


def cases() -> list[Case]:
    """Returns the cases of this family."""
    return [
        *(Case(kind, lambda s, kind=kind: Read(kind, s), _sequences, by_class) for kind in ("LSTM", "GRU", "RNN")),
        Case(
            "LSTM, two layers, both ways",
            lambda s: Read("LSTM", s, num_layers=2, bidirectional=True, dropout=0.1),
            _sequences,
            by_class,
        ),
        Case("LSTM with projections", lambda s: Read("LSTM", s, proj_size=4), _sequences, by_class),
        *(
            Case(kind, lambda s, kind=kind: Cells(kind, s), _sequences, by_class)
            for kind in ("LSTMCell", "GRUCell", "RNNCell")
        ),
        Case("LSTM translator with attention", Translator, pair, lambda m, b: classified(m(*b), b[1])),
        Case("ConvLSTM", lambda s: ConvLSTM(), lambda n, s: (torch.randn(n, 4, 3, 6, 6), labels(n)), by_class),
        Case("CRF", Crf, _tagged, lambda m, b: m(*b)),
        Case("linear recurrence", Highway, _sequences, by_class),
    ]
