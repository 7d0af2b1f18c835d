"""Fine-tunes a small BERT for classification under a privacy budget, in a training loop of one's own.

    python examples/bert.py
    python examples/bert.py --short                 # a few seconds: shows that the script runs

Needs `pip install transformers`. The way is that of any fine-tuning: take a model that was trained on public text,
freeze most of it, train the last layer and a new head on the private texts. Here both the texts and the model are made
on the spot, so that nothing has to be downloaded: "public text" draws words that belong together, BERT learns from it
to fill in masked words, and the private task is to tell which of two groups of topics a text is about.

With a model of a hub, replace `pretrained()` by `BertForSequenceClassification.from_pretrained(...)`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from privet import PrivacyEngine

DELTA = 1e-5
TOPICS, WORDS_OF_TOPIC, LENGTH, MASK = 10, 20, 16, 0
CONFIG = BertConfig(
    vocab_size=1 + TOPICS * WORDS_OF_TOPIC,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=LENGTH,
    num_labels=2,
)


def texts(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Returns texts (N, LENGTH), three words in four of one topic, and the group of topics of each, 0 or 1."""
    drawn = torch.Generator().manual_seed(seed)
    topic = torch.randint(TOPICS, (count, 1), generator=drawn)
    stray = torch.randint(TOPICS, (count, LENGTH), generator=drawn)
    topics = torch.where(torch.rand(count, LENGTH, generator=drawn) < 0.75, topic, stray)
    words = 1 + topics * WORDS_OF_TOPIC + torch.randint(WORDS_OF_TOPIC, (count, LENGTH), generator=drawn)
    return words, (topic.squeeze(1) >= TOPICS // 2).long()


def pretrained(steps: int) -> BertForSequenceClassification:
    """Returns a classifier on a BERT that learned to fill in masked words of public text."""
    public = BertForMaskedLM(CONFIG)
    optimizer = torch.optim.AdamW(public.parameters(), lr=3e-3)
    for step in range(steps):
        words, _ = texts(128, seed=1000 + step)
        hidden = torch.rand(words.shape) < 0.15
        optimizer.zero_grad()
        scores = public(input_ids=words.masked_fill(hidden, MASK)).logits
        F.cross_entropy(scores[hidden], words[hidden]).backward()
        optimizer.step()
    classifier = BertForSequenceClassification(CONFIG)
    classifier.bert.load_state_dict(public.bert.state_dict(), strict=False)  # the pooler is new
    return classifier


def accuracy(model: BertForSequenceClassification, words: Tensor, groups: Tensor) -> float:
    """Returns the share of texts whose group the model names."""
    model.eval()
    with torch.no_grad():
        found = model(input_ids=words).logits.argmax(1)
    model.train()
    return (found == groups).float().mean().item()


def main() -> None:
    """Trains, and prints what came of it."""
    parser = argparse.ArgumentParser(description="Private fine-tuning of a small BERT.")
    parser.add_argument("--epsilon", type=float, default=3.0, help="the budget, at δ = 1e-5 (default: 3)")
    parser.add_argument("--short", action="store_true", help="fewer texts, fewer steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    count, public_steps, epochs = (1024, 30, 2) if options.short else (4096, 300, 5)
    words, groups = texts(count, seed=1)
    held_out = texts(512, seed=2)

    model = pretrained(public_steps)
    model.requires_grad_(False)
    trained = (model.bert.encoder.layer[-1], model.bert.pooler, model.classifier)
    for part in trained:
        part.requires_grad_(True)
    model.train()
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3),
        data_loader=DataLoader(TensorDataset(words, groups), batch_size=256),
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=0.5,
    )
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{parameters} trained parameters; accuracy on other texts {accuracy(model, *held_out):.1%} before")
    for epoch in range(1, epochs + 1):
        for batch, targets in loader:
            optimizer.zero_grad()
            # The loss is formed here and not by the model (no labels=): the rows of the scores are the examples.
            F.cross_entropy(model(input_ids=batch).logits, targets).backward()
            optimizer.step()
        print(
            f"epoch {epoch}: accuracy on other texts {accuracy(model, *held_out):.1%}, "
            f"ε = {engine.get_epsilon(delta=DELTA):.3f} at δ = {DELTA:g}"
        )


if __name__ == "__main__":
    main()
