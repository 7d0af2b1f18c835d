"""Encoders of text of transformers, with a head that classifies, and a few as masked language models."""

from __future__ import annotations

from benchmarks.zoo.case import Case
from benchmarks.zoo.families.hugging import classifier, masked

# Settings of DeBERTa-v3 as it is published.
V3 = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "max_relative_positions": -1,
    "type_vocab_size": 0,
}
ROBERTA = {"max_position_embeddings": 50}


def cases() -> list[Case]:
    """Returns the cases of this family."""
    return [
        classifier("Bert"),
        masked("Bert"),
        masked("Bert", head="ForTokenClassification", num_labels=50),
        classifier("Roberta", **ROBERTA),
        classifier("XLMRoberta", **ROBERTA),
        classifier("Camembert", **ROBERTA),
        masked("Roberta", **ROBERTA),
        classifier("DistilBert", dim=16, hidden_dim=32, n_heads=4, n_layers=2),
        classifier("Albert", embedding_size=8),
        masked("Albert", embedding_size=8),
        classifier("Deberta", relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0),
        classifier("DebertaV2"),
        classifier("DebertaV2", name="DebertaV2 as v3", **V3),
        classifier("Electra", embedding_size=8),
        classifier("MPNet", **ROBERTA),
        classifier("ModernBert", local_attention=4),
        masked("ModernBert", local_attention=4),
        classifier("ConvBert", embedding_size=16, head_ratio=2, conv_kernel_size=3),
        classifier("FNet", tpu_short_seq_length=16),
        classifier(
            "SqueezeBert", embedding_size=16, q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2
        ),
        classifier("MobileBert", intra_bottleneck_size=16, embedding_size=16, num_feedforward_networks=2),
        classifier("Nystromformer", num_landmarks=4, segment_means_seq_len=16),
        classifier("Longformer", attention_window=4, **ROBERTA),
        classifier("BigBird", attention_type="original_full"),
        classifier("BigBird", name="BigBird block sparse", block_size=2, num_random_blocks=1, num_hidden_layers=2),
        classifier(
            "Funnel",
            num_hidden_layers=None,
            d_model=16,
            n_head=4,
            d_head=4,
            d_inner=32,
            block_sizes=[1, 1],
            num_decoder_layers=1,
        ),
        classifier(
            "Canine",
            num_hash_buckets=20,
            num_hash_functions=4,
            downsampling_rate=4,
            local_transformer_stride=4,
            upsampling_kernel_size=4,
        ),
        classifier("XLM", emb_dim=16, n_layers=2, n_heads=4, n_words=50),
        classifier("Flaubert", emb_dim=16, n_layers=2, n_heads=4, n_words=50),
        classifier("Ernie"),
        classifier("LayoutLM"),
        classifier("Luke", entity_vocab_size=10, entity_emb_size=8, **ROBERTA),
        classifier("RemBert", input_embedding_size=8, output_embedding_size=8),
        classifier("RoFormer", embedding_size=16),
        classifier("IBert", **ROBERTA),
        classifier("MegatronBert"),
        classifier("Data2VecText", **ROBERTA),
        classifier("Yoso", num_hash=2, hash_code_len=2),
        classifier("Mra", double=False, block_per_row=1),
        classifier(
            "Reformer",
            is_decoder=False,
            attention_head_size=4,
            attn_layers=["local", "lsh"],
            num_buckets=2,
            lsh_attn_chunk_length=4,
            local_attn_chunk_length=4,
            axial_pos_shape=[4, 4],
            axial_pos_embds_dim=[8, 8],
            feed_forward_size=32,
            hash_seed=0,
        ),
        classifier(
            "Perceiver",
            num_latents=4,
            d_latents=16,
            d_model=16,
            num_blocks=1,
            num_self_attends_per_block=1,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
        ),
        classifier("GPT2", name="GPT2 classifier"),
        classifier("Llama", name="Llama classifier", num_key_value_heads=2),
        masked(
            "T5", head="ForTokenClassification", num_labels=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4
        ),
    ]
