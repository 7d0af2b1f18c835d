"""A part of the zoo of architectures; and what the zoo says of a sum that is wrong, and of what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import privet
from benchmarks.zoo import examine as examining
from benchmarks.zoo.case import TINY, Case, by_class, floats
from benchmarks.zoo.doors import DOORS
from benchmarks.zoo.examine import examine
from benchmarks.zoo.families import FAMILIES, of_all
from benchmarks.zoo.families.bad_input import BinaryLinear
from benchmarks.zoo.page import page, verdict
from benchmarks.zoo.plain import clipped
from benchmarks.zoo.run import Results
from privet.gradients.rules import custom

QUICK = ("VAE", "siamese", "hypernetwork, shared", "DLRM")
PLAIN = [case for family in ("by_hand", "recurrent", "bad_input") for case in of_all(family)]


def named(name: str) -> Case:
    return next(case for case in PLAIN if case.name == name)


@pytest.mark.parametrize("name", QUICK)
def test_an_architecture_is_exact_at_both_doors(name):
    finding = examine(named(name), short=True)
    assert verdict(finding) == "exact"
    for door in DOORS:
        assert finding[door]["error"] < 1e-9
        assert finding[door]["moved"] < 1 + 1e-9


@pytest.mark.parametrize("case", of_all("bad_input"), ids=lambda case: case.name)
def test_bad_input_is_refused_by_its_name_at_both_doors(case):
    finding = examine(case, short=True)
    for door in DOORS:
        assert finding[door]["verdict"] == "refused"
        assert case.refused in finding[door]["message"]


def test_the_rule_on_the_page_makes_a_function_of_a_parameter_exact():
    @privet.register_rule(BinaryLinear)
    def rule(module, inputs, gradient):
        (x,) = inputs
        return {"weight": torch.einsum("bo,bi->boi", gradient, x)}

    try:
        case = Case("registered", lambda s: BinaryLinear(8, 3), floats(8), by_class)
        assert verdict(examine(case, short=True)) == "exact"
    finally:
        custom._MODULES.pop(BinaryLinear)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recomputed_activations_of_t5_are_exact():
    pytest.importorskip("transformers")
    cases = {case.name: case for case in of_all("checkpointing") if case.name.startswith("T5, ")}
    model = cases["T5, not reentrant"].build(TINY)
    cases["T5, not reentrant"].prepare(model)
    assert model.is_gradient_checkpointing
    assert verdict(examine(replace(cases["T5, not reentrant"], way=(("passes", 1),)))) == "exact"
    assert verdict(examine(replace(cases["T5, reentrant"], way=(("passes", 1),)))) == "exact"


@pytest.mark.parametrize("planted", ["a factor", "a step too far"])
def test_a_wrong_sum_is_found(planted, monkeypatch):
    honest = examining.sums

    def wrong(*args):
        found = honest(*args)
        first = next(iter(found[0]))
        if planted == "a factor":
            found[0][first] = found[0][first] * 1.001
        else:
            found[1][first] = found[1][first] + args[-1]
        return found

    monkeypatch.setattr(examining, "sums", wrong)
    assert verdict(examine(named("siamese"), short=True)) == "WRONG"


def test_plain_clipping_is_what_it_says():
    rows = [{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.3, 0.4])}]
    expected = clipped(rows, 1.0)
    assert torch.allclose(expected.values["w"], torch.tensor([0.9, 1.2]))
    assert expected.error({"w": torch.tensor([0.9, 1.2])})[0] < 1e-6
    assert expected.error({"w": torch.tensor([0.9, float("nan")])})[0] == float("inf")


def test_the_page_has_each_case_that_has_a_result(tmp_path):
    held = Results(tmp_path / "zoo.json")
    case = named("DLRM")
    good = {"verdict": "exact", "error": 1e-16, "moved": 1.0}
    held.add(case, {"name": case.name, "family": case.family, "dropout": False, "paper": good, "explicit": good})
    again = Results(tmp_path / "zoo.json")
    assert "| DLRM | exact, 1e-16 | exact, 1e-16 | has none |" in page(again, PLAIN)


def test_names_in_a_family_are_unique_and_all_families_are_there():
    assert len({(case.family, case.name) for case in PLAIN}) == len(PLAIN)
    assert len(FAMILIES) == 16
