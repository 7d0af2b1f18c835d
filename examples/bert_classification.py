"""Trains a small BERT to tell praise from blame with transformers' Trainer, under a privacy budget, on the CPU.

    python examples/bert_classification.py --epsilon 3

The reviews are made up here, so that nothing is downloaded: a sentence of a few words, one of which praises or blames,
and a third of which turn it round with "not". The model is built from a configuration, with random weights. With a
model of your own, only the three lines that load data, tokenizer and model change.

Printed are ε and the accuracy on held-out reviews. It takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, TrainingArguments
from transformers.utils import logging

from privet.integrations.huggingface import PrivacyArguments, PrivateTrainer

PRAISE = ("good", "lovely", "great", "fresh", "superb")
BLAME = ("bad", "awful", "stale", "poor", "dreadful")
THINGS = ("soup", "room", "film", "song", "cake", "walk", "book")
FILLERS = ("really", "today", "again", "indeed", "for", "us", "my", "friend", "said")
WORDS = ("<pad>", "the", "was", "not", *PRAISE, *BLAME, *THINGS, *FILLERS)
LENGTH = 10
DELTA = 1e-5


def review(draw: random.Random) -> tuple[list[str], int]:
    """Returns the words of a review, and 1 for praise or 0 for blame."""
    label, turned = draw.randrange(2), draw.random() < 1 / 3
    said = draw.choice(PRAISE if label != turned else BLAME)
    words = ["the", draw.choice(THINGS), "was", *(["not"] if turned else []), said]
    return words + draw.choices(FILLERS, k=draw.randrange(LENGTH - len(words) + 1)), label


def reviews(number: int, *, seed: int) -> list[dict[str, Any]]:
    """Returns a dataset of reviews, as token ids."""
    draw, found = random.Random(seed), []  # noqa: S311 - made-up data
    for _ in range(number):
        words, label = review(draw)
        ids = [WORDS.index(word) for word in words]
        padding = [0] * (LENGTH - len(ids))
        found.append({"input_ids": ids + padding, "attention_mask": [1] * len(ids) + padding, "labels": label})
    return found


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the share of reviews that were told rightly."""
    told = torch.as_tensor(prediction.predictions).argmax(1)
    return {"accuracy": float((told == torch.as_tensor(prediction.label_ids)).double().mean())}


def main(arguments: Sequence[str] | None = None) -> float:
    """Trains, prints what came of it, and returns the accuracy on held-out reviews."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=3.0, help="the privacy budget")
    parser.add_argument("--epochs", type=float, default=10, help="passes over the data")
    parser.add_argument("--examples", type=int, default=6000, help="training reviews")
    given = parser.parse_args(arguments)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    # From random weights, wider ones than those that suit a large model learn something in a few noisy steps.
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = PrivateTrainer(
            BertForSequenceClassification(config),
            TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=500,
                gradient_accumulation_steps=2,
                per_device_eval_batch_size=500,
                num_train_epochs=given.epochs,
                learning_rate=4e-3,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                save_strategy="no",
                logging_strategy="epoch",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=reviews(given.examples, seed=1),
            eval_dataset=reviews(1000, seed=2),
            compute_metrics=accuracy,
            privacy=PrivacyArguments(target_epsilon=given.epsilon, target_delta=DELTA, max_grad_norm=0.2),
        )
        trainer.train()
        told = float(trainer.evaluate()["eval_accuracy"])
    print(f"ε = {trainer.engine.get_epsilon(DELTA):.3f} at δ = {DELTA:g} for one review; accuracy {told:.1%} held out")
    return told


if __name__ == "__main__":
    main()
