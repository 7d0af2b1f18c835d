"""Ten architectures with two backwards of one forward, and with batches that are filled up to a fixed size."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.zoo.case import Case
from benchmarks.zoo.families import by_hand, causal, encoders, recurrent, seq2seq, sound, vision

TEN = ("GPT2", "Llama", "Mamba", "Bert", "T5", "Bart", "Wav2Vec2", "ViT", "Swin", "ConvNext", "LSTM", "DLRM", "TCN")
WAYS = {"two passes": (("passes", 2),), "padded": (("padded", True), ("physical_batch_size", 8))}


def cases() -> list[Case]:
    """Returns the cases of this family."""
    homes = (causal, encoders, seq2seq, sound, vision, recurrent, by_hand)
    models = [case for home in homes for case in home.cases() if case.name in TEN]
    return [
        replace(case, name=f"{case.name}, {words}", way=way, short=True)
        for case in models
        for words, way in WAYS.items()
    ]
