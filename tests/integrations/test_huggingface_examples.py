"""The examples learn what they say that they learn."""

from __future__ import annotations

import pytest

from examples import bert_classification, lora_llama_trainer


@pytest.mark.deep
@pytest.mark.parametrize("example", [bert_classification, lora_llama_trainer])
def test_an_example_learns(example, capsys):
    assert example.main([]) > 0.9
    assert "ε = " in capsys.readouterr().out
