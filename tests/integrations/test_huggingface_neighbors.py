"""An example whose loss changes beside a longer one is refused, before anything is trained."""

from __future__ import annotations

import pytest
import torch

from privet import UnsupportedModelError
from privet.integrations.huggingface.neighbors import refuse_neighbors
from tests.integrations.huggingface_models import V, built


def records(*, mask=True, lengths=(4, 7, 5)):
    found = []
    for length in lengths:
        ids = torch.randint(1, V, (length,))
        found.append({"input_ids": ids, "labels": ids, **({"attention_mask": torch.ones_like(ids)} if mask else {})})
    return found


def padding(rows, *, left=False):
    """Returns a batch, padded to its longest record on one side."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for key in rows[0]:
        filled = []
        for row in rows:
            fill = torch.full((longest - len(row[key]),), -100 if key == "labels" else 0)
            filled.append(torch.cat([fill, row[key]] if left else [row[key], fill]))
        batch[key] = torch.stack(filled)
    return batch


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "masked words", "T5", "BART"])
def test_padding_that_the_model_does_not_see_is_fine(name):
    model, _ = built(name)
    assert refuse_neighbors(model.train(), records(), padding)
    assert all(part.training for part in model.modules())


def test_padding_on_the_right_of_a_causal_model_needs_no_mask():
    assert refuse_neighbors(built("GPT-2")[0], records(mask=False), padding)


@pytest.mark.parametrize("name", ["masked words", "T5", "BART"])
def test_padding_without_a_mask_is_refused(name):
    with pytest.raises(UnsupportedModelError, match=r"beside record 1 of the dataset.*the attention_mask"):
        refuse_neighbors(built(name)[0], records(mask=False), padding)


def test_padding_on_the_left_of_absolute_positions_is_refused():
    with pytest.raises(UnsupportedModelError, match="pad on the right"):
        refuse_neighbors(built("GPT-2")[0], records(), lambda rows: padding(rows, left=True))


def test_padding_on_the_left_of_relative_positions_is_fine_but_for_a_label_that_padding_predicts():
    data = records()
    with pytest.raises(UnsupportedModelError, match="pad on the right"):
        refuse_neighbors(built("Llama")[0], data, lambda rows: padding(rows, left=True))
    for record in data:
        record["labels"] = torch.cat([torch.tensor([-100]), record["labels"][1:]])
    assert refuse_neighbors(built("Llama")[0], data, lambda rows: padding(rows, left=True))


def test_nothing_is_said_of_records_of_one_length_or_of_a_collator_that_draws():
    model, _ = built("masked words")
    assert not refuse_neighbors(model, records(mask=False, lengths=(5, 5)), padding)

    def draws(rows):
        batch = padding(rows)
        batch["labels"] = torch.where(torch.rand(batch["labels"].shape) < 0.5, batch["labels"], -100)
        return batch

    data, before = records(mask=False), torch.get_rng_state()
    assert not refuse_neighbors(model, data, draws)
    assert torch.equal(torch.get_rng_state(), before)
