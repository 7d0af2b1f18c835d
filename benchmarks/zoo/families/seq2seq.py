"""Encoders and decoders of text of transformers."""

from __future__ import annotations

from benchmarks.zoo.case import Case
from benchmarks.zoo.families.hugging import LAYERS, seq2seq

T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
BART = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2, **LAYERS}


def cases() -> list[Case]:
    """Returns the cases of this family."""
    return [
        seq2seq("T5", **T5),
        seq2seq("T5", name="T5 gated", feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5),
        seq2seq("T5", name="T5 eager attention", attn_implementation="eager", **T5),
        seq2seq("MT5", **T5),
        seq2seq("UMT5", **T5),
        seq2seq("LongT5", local_radius=3, **T5),
        seq2seq(
            "LongT5",
            name="LongT5 global",
            local_radius=3,
            global_block_size=4,
            encoder_attention_type="transient-global",
            **T5,
        ),
        seq2seq(
            "SwitchTransformers",
            num_experts=4,
            expert_capacity=64,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            double=False,
            **T5,
        ),
        seq2seq("Bart", **BART),
        seq2seq("MBart", **BART),
        seq2seq("Marian", head="MTModel", decoder_vocab_size=50, **BART),
        seq2seq("Pegasus", **BART),
        seq2seq("PegasusX", block_size=4, num_global_tokens=2, **BART),
        seq2seq("Blenderbot", **BART),
        seq2seq("BlenderbotSmall", **BART),
        seq2seq("PLBart", **BART),
        seq2seq("BigBirdPegasus", attention_type="original_full", **BART),
        seq2seq("M2M100", **BART),
        seq2seq(
            "LED", attention_window=4, max_encoder_position_embeddings=40, max_decoder_position_embeddings=40, **BART
        ),
        seq2seq(
            "ProphetNet",
            num_hidden_layers=None,
            hidden_size=16,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_buckets=4,
            relative_max_distance=8,
            ngram=2,
            disable_ngram_loss=True,
        ),
        seq2seq("FSMT", langs=["a", "b"], src_vocab_size=50, tgt_vocab_size=50, double=False, **BART),
        seq2seq(
            "NllbMoe",
            num_experts=4,
            encoder_sparse_step=1,
            decoder_sparse_step=1,
            expert_capacity=64,
            double=False,
            **BART,
        ),
    ]
