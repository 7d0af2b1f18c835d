"""Test files are found by their names alone, so no two may have the same one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def test_no_two_test_files_have_one_name():
    counts = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert len(counts) > 50
    assert not [name for name, count in counts.items() if count > 1]
