"""The names of transformers that this door uses; importing it says what to install where they are missing.

Nothing else here imports transformers, but in functions.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["Seq2SeqTrainer", "Trainer", "TrainerCallback", "TrainingArguments", "modeling_auto"]

_LEAST = {"transformers": (4, 46), "accelerate": (1, 0)}


def _refuse_what_is_missing() -> None:
    """Raises ImportError, in one line, if a package is missing or too old."""
    for package, least in _LEAST.items():
        wanted = ".".join(map(str, least))
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
        if numbers < least:
            raise ImportError(
                f"privet.integrations.huggingface needs {package} {wanted} or newer, found {found}: "
                "pip install 'privet[huggingface]'"
            )


_refuse_what_is_missing()

from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments  # noqa: E402 - after the refusal
from transformers.models.auto import modeling_auto  # noqa: E402
