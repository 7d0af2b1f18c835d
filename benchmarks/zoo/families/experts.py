"""Mixtures of experts of transformers, with each way that they compute their experts."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.case import Case
from benchmarks.zoo.families.hugging import causal

BATCHED = "experts_implementation='batched_mm' is exact"


def _each(kind: str, **more: Any) -> list[Case]:
    """Returns the case as it comes, and with batched products. Experts compute in float32: so do these cases."""
    settings = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "double": False, **more}
    return [
        causal(kind, note=BATCHED, **settings),
        causal(kind, name=f"{kind} batched_mm", experts_implementation="batched_mm", **settings),
    ]


def cases() -> list[Case]:
    """Returns the cases of this family."""
    deepseek = {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
        "first_k_dense_replace": 1,
    }
    return [
        *_each("Mixtral", num_local_experts=4),
        *_each("Qwen2Moe", moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=4),
        *_each("Qwen3Moe", moe_intermediate_size=8, num_experts=4, head_dim=4),
        *_each("DeepseekV3", **deepseek),
        *_each("Olmoe", num_experts=4),
        *_each("GraniteMoe", num_local_experts=4),
        *_each("Phimoe", num_local_experts=4),
        *_each("GptOss", num_local_experts=4, head_dim=4),
        *_each("Ernie4_5_Moe", moe_num_experts=4, moe_intermediate_size=8, moe_k=2, moe_layer_start_index=0),
        *_each(
            "Glm4Moe",
            n_routed_experts=4,
            n_shared_experts=1,
            moe_intermediate_size=8,
            n_group=1,
            topk_group=1,
            head_dim=4,
            first_k_dense_replace=1,
        ),
    ]
