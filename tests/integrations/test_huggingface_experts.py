"""Mixtures of experts of transformers, as they come: grouped products and loops over experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import CoverageError, Flat, UnsupportedModelError
from privet.validation import validate
from tests.contracts.doors import assert_exact, distance, door_sum, explicit_sum, reference

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

V, T = 20, 4


def mixture(kind: str, experts: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    if kind == "Mixtral":
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    elif kind == "Qwen3Moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "moe_intermediate_size": 8}
    else:
        sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 4}
        sizes |= {"kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
        sizes |= {"moe_intermediate_size": 8, "first_k_dense_replace": 0, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **options)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.set_experts_implementation(experts)  # type: ignore[operator]
    return model.train()


def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    logits = model(input_ids=batch[0], use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), batch[0], reduction="none").mean(1)


def tokens(examples: int) -> tuple[Tensor]:
    return (torch.randint(V, (examples, T), generator=torch.Generator().manual_seed(examples)),)


@pytest.mark.parametrize(
    ("kind", "experts", "door"),
    [
        ("Mixtral", "grouped_mm", "paper"),
        ("Mixtral", "grouped_mm", "explicit"),
        ("Mixtral", "eager", "explicit"),
        ("Qwen3Moe", "grouped_mm", "explicit"),
        ("DeepseekV3", "grouped_mm", "explicit"),
    ],
)
def test_the_sum_is_that_of_the_examples_one_by_one(kind: str, experts: str, door: str) -> None:
    net, batch = mixture(kind, experts), tokens(4)  # as many as positions and experts
    assert_exact(
        door_sum(door, net, tokens(3), batch, loss=loss_of, policy=Flat(1e-2)),
        reference(net, batch, loss_of, Flat(1e-2)),
    )


def test_the_product_that_transformers_falls_back_to_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = pytest.importorskip("transformers.integrations.moe")
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *rest: False)
    net, batch = mixture("Mixtral", "grouped_mm").double(), tokens(4)
    found = explicit_sum(net, batch, loss=loss_of, policy=Flat(1e-2))
    assert_exact(found, reference(net, batch, loss_of, Flat(1e-2)), tolerance=1e-5)  # it computes norms in float32


def test_one_example_moves_the_sum_by_at_most_the_clip_norm() -> None:
    net, (ids,) = mixture("Mixtral", "grouped_mm"), tokens(5)

    def summed(some: Tensor) -> dict[str, Tensor]:
        return explicit_sum(net, (some,), loss=lambda m, b: 1e3 * loss_of(m, b), policy=Flat(1.0))

    assert 0.5 < distance(summed(ids), summed(ids[:-1])) <= 1.0 + 1e-4


def test_a_load_balancing_loss_is_refused() -> None:
    moe = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")

    def balanced(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        found = model(input_ids=batch[0], use_cache=False, output_router_logits=True)
        losses = F.cross_entropy(found.logits.transpose(1, 2), batch[0], reduction="none").mean(1)
        return losses + 0.1 * moe.load_balancing_loss_func(found.router_logits, 4, 2)  # type: ignore[no-any-return]

    with pytest.raises((CoverageError, UnsupportedModelError), match="load-balancing"):
        explicit_sum(mixture("Mixtral", "grouped_mm"), tokens(4), loss=balanced, policy=Flat(1.0))
    with pytest.raises(UnsupportedModelError, match="load-balancing"):
        door_sum("paper", mixture("Mixtral", "grouped_mm"), tokens(4), loss=balanced)


def test_a_checkpointed_mixture_is_exact() -> None:
    checkpointed, plain = (mixture("Mixtral", "grouped_mm") for _ in range(2))
    batch = tokens(4)
    checkpointed.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    found = explicit_sum(checkpointed, batch, loss=loss_of, policy=Flat(1e-2))
    assert_exact(found, reference(plain, batch, loss_of, Flat(1e-2)))


def translator(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "d_model": 8, "num_experts": 4}
    if kind == "SwitchTransformers":
        sizes |= {"d_kv": 4, "d_ff": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
        sizes |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 1}
        options |= {"dropout_rate": 0.0, "router_jitter_noise": 0.0}
    else:
        sizes |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes |= {"encoder_sparse_step": 1, "decoder_sparse_step": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes, **options)
    model: nn.Module = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return model.train()


def translated(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    logits = model(input_ids=batch[0], decoder_input_ids=batch[0], use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), batch[0], reduction="none").mean(1)


def test_a_capacity_that_is_counted_over_each_sequence_is_exact() -> None:
    net, batch = translator("SwitchTransformers"), tokens(4)  # one token for each expert: others are dropped
    found = explicit_sum(net, batch, loss=translated, policy=Flat(1e-2))
    assert_exact(found, reference(net, batch, translated, Flat(1e-2)))


def test_a_capacity_that_is_counted_over_the_batch_is_refused_by_the_word() -> None:
    for options in ({}, {"expert_capacity": 2**31}):  # an evaluation sets the second one back
        assert any("capacity counts" in str(issue) for issue in validate(translator("NllbMoe", **options)))
    with pytest.raises(UnsupportedModelError, match=r"capacity counts the tokens of the whole batch.*expert_capacity"):
        explicit_sum(translator("NllbMoe"), tokens(4), loss=translated, policy=Flat(1.0))
    unbounded = translator("NllbMoe", expert_capacity=2**31, moe_eval_capacity_token_fraction=-1.0)
    assert not validate(unbounded)
