"""Every example runs in its short form, spends what it was allowed to spend, and those that can learn something do.

The examples for several processes are run in `parallel/test_example.py`, those for the Trainer of transformers, for
Lightning and for Accelerate in `integrations/test_huggingface_examples.py` and `test_framework_examples.py`.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ELSEWHERE = {
    "accelerate_digits",
    "bert_classification",
    "ddp",
    "fsdp_lora",
    "lightning_digits",
    "lora_llama_trainer",
    "tensor_parallel",
}

# For each example: its short form, its budget (None: it has several), and a figure that the short form reaches, if any.
SHORT = {
    "audit": (["--quick"], None, None),
    "augmentation": (["--short"], 3.0, (r"accuracy ([\d.]+)%", lambda found: found[-1] > 40)),
    "bert": (["--short"], 3.0, None),
    "digits": (["--short"], 8.0, (r"accuracy ([\d.]+)%", lambda found: found[-1] > 40)),
    "fashion_mnist": (["--short"], 3.0, (r"pictures ([\d.]+)%", lambda found: found[-1] > 20)),
    "gan": (["--short"], 8.0, None),
    "languages": (["--short"], 3.0, (r"words ([\d.]+)%", lambda found: found[-1] > 60)),
    "lora": (["--short"], 8.0, (r"sentences ([\d.]+)", lambda found: found[-1] < found[0])),
    "user_level": (["--short"], 4.0, (r"people: ([\d.]+)%", lambda found: found[-1] > 60)),
}


def test_every_example_is_run():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(SHORT) | ELSEWHERE


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks transformers for an old name
@pytest.mark.parametrize(
    # What the audit prints is tested in tests/audit; its example takes as long as three others.
    "name",
    [pytest.param(name, marks=[pytest.mark.deep] if name == "audit" else []) for name in sorted(SHORT)],
)
def test_the_short_form_runs_within_its_budget(name, monkeypatch, capsys, tmp_path):
    options, budget, figure = SHORT[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "ε" in said
    if budget is not None:
        spent = [float(found) for found in re.findall(r"ε = ([\d.]+)", said)]
        assert 0.9 * budget < max(spent) <= budget
    if figure is not None:
        pattern, good = figure
        assert good([float(found) for found in re.findall(pattern, said)]), said
