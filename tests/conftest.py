"""What every test starts from, so that a red run says that something changed and not that the dice fell badly.

Public draws (weights, data, the examples of Hypothesis) are the same in every run. What is drawn in secret never is:
batches and noise come from the operating system. `make explore` lets Hypothesis draw other examples, and
`make test-cpus` moves the seeds.
"""

from __future__ import annotations

import os
import random
import sys
import zlib

import numpy as np
import pytest
from hypothesis import settings

from tests.thinned import thin

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, print_blob=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def _same_seed(request):
    seed = zlib.crc32(request.node.nodeid.encode()) ^ int(os.environ.get("PRIVET_TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if (torch := sys.modules.get("torch")) is not None:  # not imported: the accountants are tested without it as well
        torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leaves a part of the largest products to the deep tests, before those are deselected."""
    thin(items)
