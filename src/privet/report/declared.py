"""What a user may declare: the topics that no ledger can know about, each in words of the user's own."""

from __future__ import annotations

from collections.abc import Mapping

from privet.errors import ConfigurationError

__all__ = ["TOPICS", "check_declarations"]

TOPICS: Mapping[str, str] = {
    "access": "who can reach the raw data, the machine, its memory and the secret keys",
    "adaptivity": "how noise, rates and the time to stop were chosen",
    "bias": "what was done about people whom the data or the model serve worse",
    "clip_norm": "the clip norm, or its schedule",
    "contribution": "how many records one person has, and how that is bounded",
    "early_stopping": "how the released checkpoint was chosen among all",
    "other_releases": "what else was or will be released about the same data",
    "preprocessing": "which steps before training looked at the private data",
    "public_data": "which data and models were taken as public, and why they are",
    "randomness": "which generator drew noise and batches, and whether it is cryptographically secure",
    "side_channels": "what is done about timing, memory and power",
    "statistics": "losses, accuracies and other numbers that left the machine without noise",
    "trust": "who holds the data, and why people may trust them",
    "tuning": "how hyperparameters were chosen",
}
"""For each topic, what a declaration of it should say."""


def check_declarations(declarations: Mapping[str, str]) -> dict[str, str]:
    """Returns the declarations, by topic in order.

    Raises:
        ConfigurationError: for a topic that is not known, with all that are, or a text that says nothing.
    """
    unknown = sorted(set(declarations) - set(TOPICS))
    if unknown:
        raise ConfigurationError(f"Nothing is known of {', '.join(unknown)}. Topics to declare: {', '.join(TOPICS)}.")
    given: Mapping[str, object] = declarations
    for topic, text in given.items():
        if not isinstance(text, str) or not text.strip():
            raise ConfigurationError(f"The declaration of {topic} must be a text that says something, got {text!r}.")
    return {topic: declarations[topic] for topic in TOPICS if topic in declarations}
