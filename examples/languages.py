"""Trains a character LSTM to tell the language of a word, under a privacy budget, from word lists on disk.

    python examples/languages.py --words /usr/share/dict
    python examples/languages.py --short            # words of made-up languages, a few seconds

Debian and Ubuntu have word lists: `apt-get install wamerican wngerman wfrench witalian wspanish wswedish wpolish`. Any
folder of text files with a word a line will do, one file a language. A word takes the place of a record that a person
owns, such as a name. What the model is told beforehand is public: the languages, and that letters are bytes of UTF-8.
A vocabulary that was collected from the private words would not be.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine

DELTA = 1e-5
LONGEST = 16  # bytes
LISTS = ("american-english", "french", "italian", "ngerman", "polish", "spanish", "swedish")


class Reader(nn.Module):
    """A character LSTM. torch's own layer is used as it is."""

    def __init__(self, languages: int, *, width: int = 64) -> None:
        super().__init__()
        self.letters = nn.Embedding(256, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, languages)

    def forward(self, word: Tensor) -> Tensor:  # (B, T) -> (B, languages)
        """Returns the scores of the languages, from the state after the last letter."""
        states, _ = self.lstm(self.letters(word))
        last = ((word != 0).sum(1) - 1).clamp(min=0)
        return self.head(states[torch.arange(len(word), device=word.device), last])


def as_bytes(words: list[str]) -> Tensor:  # (N, LONGEST)
    """Returns the words as bytes of UTF-8, filled up with zeros and cut at LONGEST."""
    rows = [word.encode()[:LONGEST].ljust(LONGEST, b"\0") for word in words]
    return torch.tensor([list(row) for row in rows])


def word_list(path: Path) -> list[str]:
    """Returns the words of a file in lower case, in either of the two encodings that such lists have."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return [word for word in text.lower().split() if word.isalpha() and len(word) > 3]


def invented_list(language: int, count: int) -> list[str]:
    """Returns words of a made-up language, which has its own taste in letters."""
    taste = torch.rand(26, generator=torch.Generator().manual_seed(language)) ** 4
    letters = torch.multinomial(taste, 8 * count, replacement=True).view(count, 8)
    return ["".join(chr(ord("a") + letter) for letter in row) for row in letters.tolist()]


def datasets(lists: list[list[str]], each: int) -> tuple[TensorDataset, TensorDataset]:
    """Returns words to train on, as many of each language, and a fifth of as many held out."""
    train, test = [], []
    for label, words in enumerate(lists):
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))[: each + each // 5].tolist()
        for part, chosen in ((train, order[:each]), (test, order[each:])):
            part.append((as_bytes([words[i] for i in chosen]), torch.full((len(chosen),), label)))
    joined = [[torch.cat(column) for column in zip(*part, strict=True)] for part in (train, test)]
    return TensorDataset(*joined[0]), TensorDataset(*joined[1])


def main() -> None:
    """Trains, and prints what came of it."""
    parser = argparse.ArgumentParser(description="The language of a word, learned privately.")
    parser.add_argument("--words", type=Path, default=Path("/usr/share/dict"), help="a folder of word lists")
    parser.add_argument("--epsilon", type=float, default=3.0, help="the budget, at δ = 1e-5 (default: 3)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights; noise and batches have no seed")
    parser.add_argument("--short", action="store_true", help="made-up words, few steps")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    if options.short:
        train, test = datasets([invented_list(language, 480) for language in range(3)], 400)
        batch_size, epochs, languages = 128, 2, 3
    else:
        found = [options.words / name for name in LISTS if (options.words / name).exists()]
        if len(found) < 2:
            parser.error(f"{options.words} holds fewer than two of {', '.join(LISTS)}")
        train, test = datasets([word_list(path) for path in found], 10_000)
        batch_size, epochs, languages = 1024, options.epochs, len(found)

    model = Reader(languages)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        data_loader=DataLoader(train, batch_size=batch_size),
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=1.0,
    )
    words, labels = test.tensors
    begun = time.perf_counter()
    for epoch in range(1, epochs + 1):
        for batch, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), targets).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(words).argmax(1) == labels).float().mean().item()
        model.train()
        print(
            f"epoch {epoch:2}: {languages} languages, accuracy on other words {accuracy:.1%}, "
            f"ε = {engine.get_epsilon(delta=DELTA):.3f} at δ = {DELTA:g}, {time.perf_counter() - begun:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
