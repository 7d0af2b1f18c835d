"""A pytest plugin that takes a run to other seeds and other numbers of threads: `scripts/test_cpus.py` loads it.

Tests set their own seeds, so that every run is the same, and most ask for one thread. Here each fixed seed is moved by
`PRIVET_TEST_SEED`, the same everywhere, and each request for threads gets `PRIVET_TEST_THREADS`.
"""

from __future__ import annotations

import os

import torch

SEED = int(os.environ.get("PRIVET_TEST_SEED", "0"))
THREADS = int(os.environ.get("PRIVET_TEST_THREADS", "1"))

_manual_seed, _set_num_threads = torch.manual_seed, torch.set_num_threads


def _moved(seed: int) -> torch.Generator:
    return _manual_seed(int(seed) + 1_000_003 * SEED)


torch.manual_seed = torch.random.manual_seed = _moved
torch.set_num_threads = lambda threads: _set_num_threads(THREADS)
_set_num_threads(THREADS)


def pytest_report_header() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch: {capability}, {torch.get_num_threads()} threads, seeds moved by {SEED}"
