"""Private training of Hugging Face models: a Trainer, and the loss of each example for loops of one's own.

It needs transformers 4.46 or newer: `pip install 'privet[huggingface]'`. The page is docs/huggingface.md.
"""

from privet.integrations.huggingface.arguments import PrivacyArguments
from privet.integrations.huggingface.losses import loss_per_example, model_inputs, per_example_loss
from privet.integrations.huggingface.registered import register_loss
from privet.integrations.huggingface.trainer import PrivateSeq2SeqTrainer, PrivateTrainer

__all__ = [
    "PrivacyArguments",
    "PrivateSeq2SeqTrainer",
    "PrivateTrainer",
    "loss_per_example",
    "model_inputs",
    "per_example_loss",
    "register_loss",
]
