"""The loss of each example equals the loss that a model of transformers computes for that example alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from privet import ConfigurationError, PrivacyEngine, UnsupportedModelError
from privet.integrations.huggingface import model_inputs, per_example_loss
from tests.integrations.huggingface_models import FAMILIES, SMALL, N, T, V, batch_of, built, tokens


def own_losses(model, data):
    """Returns the model's own loss for each example, in a batch of its own."""
    return torch.stack([model(**batch_of([record])).loss for record in data]).double()


@pytest.mark.parametrize("name", FAMILIES)
def test_for_one_example_it_is_the_loss_of_the_model_itself(name):
    model, data = built(name)
    model.eval()
    batch = batch_of(data)
    with torch.no_grad():
        expected = own_losses(model, data)
        found = per_example_loss(model, model(**model_inputs(model, batch)), batch)
        assert model(**model_inputs(model, batch), return_dict=False)[0].shape[0] == N
    assert found.shape == (N,)
    # transformers takes the softmax of language models in single precision
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_an_example_without_any_label_has_no_loss_and_changes_no_other():
    model, data = built("GPT-2")
    batch = batch_of(data)
    before = per_example_loss(model, model(**model_inputs(model, batch)), batch)
    batch["labels"][0] = -100
    after = per_example_loss(model, model(**model_inputs(model, batch)), batch)
    assert after[0] == 0
    assert torch.equal(after[1:], before[1:])


def test_an_answer_outside_of_the_text_is_left_out():
    model, data = built("answers")
    batch = batch_of(data)
    whole = per_example_loss(model, model(**model_inputs(model, batch)), batch)
    batch["end_positions"][0] = 1000
    found = per_example_loss(model, model(**model_inputs(model, batch)), batch)
    assert 0 < found[0] < whole[0]
    assert torch.isfinite(found).all()


def test_a_tuple_serves_as_outputs():
    model, data = built("answers")
    batch = batch_of(data)
    inputs = model_inputs(model, batch)
    found = per_example_loss(model, model(**inputs, return_dict=False), batch)
    assert torch.equal(found, per_example_loss(model, model(**inputs), batch))


def test_virtual_tokens_in_front_are_left_out_as_peft_leaves_them_out():
    from peft import PromptTuningConfig, get_peft_model

    model, data = built("GPT-2")
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).double().eval()
    batch = batch_of(data)
    with torch.no_grad():
        found = per_example_loss(model, model(**model_inputs(model, batch)), batch)
        assert (found - own_losses(model, data)).abs().max() < 1e-6 * found.max()


def test_smoothing_is_that_of_the_trainer_for_one_example():
    from transformers.trainer_pt_utils import LabelSmoother

    model, data = built("tokens")
    batch = batch_of(data)
    outputs = model(**model_inputs(model, batch))
    found = per_example_loss(model, outputs, batch, label_smoothing=0.1)
    for i in range(N):
        one = {"logits": outputs.logits[i : i + 1]}
        assert torch.isclose(found[i], LabelSmoother(epsilon=0.1)(one, batch["labels"][i : i + 1]))


def test_smoothing_a_number_is_refused():
    model, data = built("a number")
    batch = batch_of(data)
    with pytest.raises(ConfigurationError, match="label_smoothing_factor"):
        per_example_loss(model, model(**model_inputs(model, batch)), batch, label_smoothing=0.1)


def clip():
    from transformers import CLIPConfig, CLIPModel

    usual = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**usual, "vocab_size": V, "max_position_embeddings": 16}
    vision = {**usual, "image_size": 4, "patch_size": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))


def test_a_loss_over_pairs_is_refused_by_the_word():
    model = clip()
    with pytest.raises(UnsupportedModelError, match="contrastive: it compares every pair of examples inside a batch"):
        model_inputs(model, {"input_ids": tokens(2, T)})


def test_a_model_that_compares_pairs_is_refused_by_the_word_at_the_door():
    model = clip().train()
    data = [{"input_ids": tokens(T), "pixel_values": torch.randn(3, 4, 4)} for _ in range(N)]
    model, _, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=N),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    (batch,) = loader
    with pytest.raises(
        UnsupportedModelError, match=r"every pair of examples inside the batch.* contrastive or pairwise"
    ):
        model(**batch, return_loss=True)


def test_other_losses_are_refused_with_the_address():
    from transformers import BertConfig, BertForPreTraining

    with pytest.raises(
        UnsupportedModelError, match=r"huggingface\.per_example_loss does not know .*BertForPreTraining"
    ):
        model_inputs(BertForPreTraining(BertConfig(**SMALL)), {})
    with pytest.raises(UnsupportedModelError, match="does not know the loss of Linear"):
        model_inputs(torch.nn.Linear(2, 2), {})


def test_a_loss_of_ones_own_is_registered_for_a_class():
    from transformers import BertConfig, BertForPreTraining
    from transformers import logging as words

    from privet.integrations.huggingface import register_loss
    from privet.integrations.huggingface.registered import _LOSSES

    words.set_verbosity_error()

    class Mine(BertForPreTraining):
        pass

    try:

        @register_loss(Mine, labels=("labels", "next_sentence_label"))
        def pretraining(model, outputs, batch):
            masked = F.cross_entropy(outputs.prediction_logits.transpose(1, 2), batch["labels"], reduction="none").mean(
                1
            )
            follows = outputs.seq_relationship_logits
            return masked + F.cross_entropy(follows, batch["next_sentence_label"], reduction="none")

        model = Mine(BertConfig(**SMALL)).double().eval()
        batch = {"input_ids": tokens(N, T), "labels": tokens(N, T), "next_sentence_label": torch.arange(N) % 2}
        inputs = model_inputs(model, batch)
        assert set(inputs) == {"input_ids"}
        found = per_example_loss(model, model(**inputs), batch)
        expected = torch.stack([model(**{k: v[i : i + 1] for k, v in batch.items()}).loss for i in range(N)])
        assert torch.allclose(found, expected)
    finally:
        _LOSSES.pop(Mine, None)
    with pytest.raises(UnsupportedModelError, match=r"register_loss"):
        model_inputs(model, batch)
    with pytest.raises(ConfigurationError, match="takes a class of models"):
        register_loss(model)


def test_a_load_balancing_loss_is_refused():
    model, _ = built("Llama")
    model.config.output_router_logits = True
    with pytest.raises(UnsupportedModelError, match="output_router_logits = False"):
        model_inputs(model, {})


def test_a_batch_without_labels_says_what_it_has():
    model, data = built("answers")
    batch = batch_of(data)
    outputs = model(**model_inputs(model, batch))
    del batch["end_positions"]
    with pytest.raises(
        ConfigurationError, match=r"no end_positions.*it has input_ids, attention_mask, start_positions"
    ):
        per_example_loss(model, outputs, batch)


def test_a_decoder_without_labels_says_what_it_needs():
    model, _ = built("T5")
    with pytest.raises(ConfigurationError, match=r"needs decoder_input_ids.*the batch has no labels"):
        model_inputs(model, {"input_ids": tokens(2, T)})
    given = {"input_ids": tokens(2, T), "decoder_input_ids": tokens(2, 3), "labels": tokens(2, 3)}
    assert torch.equal(model_inputs(model, given)["decoder_input_ids"], given["decoder_input_ids"])
