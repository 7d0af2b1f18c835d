"""The names of transformers that this door uses; importing it says what to install where they are missing.

Nothing else here imports transformers, but in functions.
"""

from __future__ import annotations

from privet.integrations.needed import need

__all__ = ["Seq2SeqTrainer", "Trainer", "TrainerCallback", "TrainingArguments", "modeling_auto"]

need("transformers", "4.46", extra="huggingface")
need("accelerate", "1.0", extra="huggingface")

from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments  # noqa: E402 - after the refusal
from transformers.models.auto import modeling_auto  # noqa: E402
