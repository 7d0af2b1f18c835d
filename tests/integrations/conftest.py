"""Warnings of the frameworks about themselves, and no network."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

_FRAMEWORKS_OWN = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft asks transformers for it
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/integrations/test_huggingface" in str(item.path):
            for filtered in _FRAMEWORKS_OWN:
                item.add_marker(pytest.mark.filterwarnings(filtered))
