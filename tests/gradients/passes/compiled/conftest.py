"""What the tests of compiled steps share."""

from __future__ import annotations

import pytest
import torch

from privet.gradients.passes.compiled import step_graph


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gradients/passes/compiled" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning"))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def graphs(monkeypatch):
    """Runs graphs as they were traced, and returns a list of them."""
    found = []

    def kept(graph, *, fullgraph, dynamic, backend):
        assert fullgraph
        assert not dynamic
        assert backend == "inductor"
        found.append(graph)
        return graph

    monkeypatch.setattr(step_graph.torch, "compile", kept)
    return found
