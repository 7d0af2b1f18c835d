"""The architectures whose private steps are timed, from small configurations with random weights.

Width 256, 2 layers, 128 positions where the architecture leaves the choice. Each model returns one tensor, (B, ...).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ARCHITECTURES"]

Inputs = tuple[Tensor, ...]
Built = tuple[nn.Module, Callable[[int], Inputs]]  # the model, and its inputs for so many examples
WIDTH, LAYERS, HEADS, LENGTH, VOCABULARY = 256, 2, 4, 128, 1000


class Output(nn.Module):
    """A model of transformers, as a module of tensors: its first output alone."""

    def __init__(self, inner: nn.Module, *names: str) -> None:
        super().__init__()
        self.inner = inner
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:  # (B, ...) each
        """Returns the first output."""
        output: Tensor = self.inner(**dict(zip(self.names, inputs, strict=True)))[0]
        return output


def tokens(count: int) -> Inputs:
    """Returns ids, (B, T)."""
    return (torch.randint(3, VOCABULARY, (count, LENGTH)),)


def of_transformers(kind: str, config: str, *names: str, **options: Any) -> nn.Module:
    """Returns a model of transformers, in training."""
    import transformers

    return Output(getattr(transformers, kind)(getattr(transformers, config)(**options)), *names).train()


def text(kind: str, config: str, **more: Any) -> Callable[[], Built]:
    """Returns the maker of a model of one text."""

    def build() -> Built:
        options = {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "intermediate_size": 4 * WIDTH, "max_position_embeddings": LENGTH, "attention_dropout": 0.0,
        }  # fmt: skip
        return of_transformers(kind, config, "input_ids", **(options | more)), tokens

    return build


def gpt2() -> Built:
    """Returns GPT-2 with its language modelling head."""
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    return of_transformers("GPT2LMHeadModel", "GPT2Config", "input_ids", use_cache=False, **sizes), tokens


def rwkv() -> Built:
    """Returns RWKV."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "context_length": LENGTH}
    return of_transformers("RwkvForCausalLM", "RwkvConfig", "input_ids", use_cache=False, **sizes), tokens


def t5() -> Built:
    """Returns T5, whose encoder and decoder have relative biases."""
    sizes = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 4 * WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
    model = of_transformers(
        "T5ForConditionalGeneration", "T5Config", "input_ids", "decoder_input_ids",
        vocab_size=VOCABULARY, use_cache=False, decoder_start_token_id=0, **sizes,
    )  # fmt: skip
    return model, lambda count: (*tokens(count), *tokens(count))


def wav2vec2(*, masks: bool) -> Callable[[], Built]:
    """Returns the maker of wav2vec2, whose positions are a convolution with weight norm."""

    def build() -> Built:
        model = of_transformers(
            "Wav2Vec2Model", "Wav2Vec2Config", "input_values", hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, intermediate_size=4 * WIDTH, conv_dim=(64, 64, 64), conv_stride=(5, 4, 4),
            conv_kernel=(10, 8, 4), num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=16,
            num_feat_extract_layers=3, apply_spec_augment=masks, layerdrop=0.0, mask_time_length=4,
            feat_extract_norm="layer",
        )  # fmt: skip
        return model, lambda count: (torch.randn(count, 80 * LENGTH),)

    return build


def images(kind: str, config: str, size: int, **options: Any) -> Callable[[], Built]:
    """Returns the maker of a model of one image."""

    def build() -> Built:
        model = of_transformers(kind, config, "pixel_values", image_size=size, **options)
        return model, lambda count: (torch.randn(count, 3, size, size),)

    return build


class DLRM(nn.Module):
    """Categories looked up in tables, dense features, and their pairwise products (Naumov et al. 2019)."""

    def __init__(self, *, tables: int = 8, entries: int = 10_000, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(entries, width, mode="sum") for _ in range(tables))
        self.below = nn.Sequential(nn.Linear(13, 256), nn.ReLU(), nn.Linear(256, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.above = nn.Sequential(nn.Linear(pairs + width, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 1)
        self.register_buffer("places", torch.triu_indices(tables + 1, tables + 1, 1), persistent=False)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:  # (B, 13), (B, tables, L)
        """Returns (B, 1)."""
        x = self.below(dense)
        met = torch.stack([x, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(met, met.mT)[:, self.places[0], self.places[1]]
        found: Tensor = self.head(self.above(torch.cat([x, products], 1)))
        return found


class TCN(nn.Module):
    """Dilated causal convolutions with weight norm (Bai et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        widths = (16, *(WIDTH,) * (2 * LAYERS))
        self.layers = nn.ModuleList(
            norm(nn.Conv1d(a, b, 3, dilation=2 ** (i // 2))) for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:  # (B, 16, T)
        """Returns (B, 10)."""
        for layer in self.layers:
            x = F.relu(layer(F.pad(x, (2 * layer.dilation[0], 0))))
        found: Tensor = self.head(x[:, :, -1])
        return found


class ODE(nn.Module):
    """Euler steps of one field, whose weights are used at every step."""

    def __init__(self, *, steps: int = 10) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 10)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:  # (B, T, WIDTH)
        """Returns (B, 10)."""
        for _ in range(self.steps):
            x = x + self.field(x) / self.steps
        found: Tensor = self.head(x.mean(1))
        return found


class CellLoop(nn.Module):
    """A recurrent cell of torch in a loop over the positions."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = kind(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, WIDTH)
        """Returns (B, 10)."""
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        found: Tensor = self.head(state[0] if isinstance(state, tuple) else state)
        return found


class Packed(nn.Module):
    """A recurrent layer of torch over sequences of different lengths, packed."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer = kind(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # (B, T, WIDTH), (B,)
        """Returns (B, 10)."""
        rnn = nn.utils.rnn
        packed = rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=x.shape[1])
        found: Tensor = self.head(outputs.sum(1) / lengths.unsqueeze(1))
        return found


def sequences(count: int) -> Inputs:
    """Returns positions, (B, T, WIDTH)."""
    return (torch.randn(count, LENGTH, WIDTH),)


def with_lengths(count: int) -> Inputs:
    """Returns positions and how many of them count, half of them or more."""
    return (*sequences(count), torch.randint(LENGTH // 2, LENGTH + 1, (count,)))


def by_hand(make: Callable[[], nn.Module], inputs: Callable[[int], Inputs]) -> Callable[[], Built]:
    """Returns the maker of a module of this file."""
    return lambda: (make(), inputs)


def lora() -> Built:
    """Returns a small Llama with LoRA on queries and values."""
    import peft

    model, inputs = llama()
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    return Output(peft.get_peft_model(model.inner, config), "input_ids").train(), inputs


llama = text("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=HEADS, use_cache=False)
_SWIN = {"embed_dim": 64, "depths": [1, 1, 1], "num_heads": [2, 4, 8], "window_size": 7, "patch_size": 4}
ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "Llama, LoRA": lora,
    "Gemma 2": text(
        "Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, use_cache=False
    ),
    "RWKV": rwkv,
    "BERT": text("BertForMaskedLM", "BertConfig"),
    "DeBERTa": text("DebertaModel", "DebertaConfig", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "T5": t5,
    "wav2vec2": wav2vec2(masks=False),
    "wav2vec2, SpecAugment": wav2vec2(masks=True),
    "ViT": images(
        "ViTForImageClassification", "ViTConfig", 176, patch_size=16, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
    ),
    "Swin": images("SwinForImageClassification", "SwinConfig", 112, **_SWIN),
    "ConvNeXt": images("ConvNextForImageClassification", "ConvNextConfig", 64, hidden_sizes=[64, 128, 256],
        depths=[1, 1, 2], num_stages=3),
    "DLRM": by_hand(DLRM, lambda count: (torch.randn(count, 13), torch.randint(0, 10_000, (count, 8, 4)))),
    "TCN, weight norm": by_hand(TCN, lambda count: (torch.randn(count, 16, LENGTH),)),
    "ODE loop": by_hand(ODE, sequences),
    "LSTMCell loop": by_hand(lambda: CellLoop(nn.LSTMCell), sequences),
    "GRUCell loop": by_hand(lambda: CellLoop(nn.GRUCell), sequences),
    "RNNCell loop": by_hand(lambda: CellLoop(nn.RNNCell), sequences),
    "LSTM, packed": by_hand(lambda: Packed(nn.LSTM), with_lengths),
    "GRU, packed": by_hand(lambda: Packed(nn.GRU), with_lengths),
    "RNN, packed": by_hand(lambda: Packed(nn.RNN), with_lengths),
}  # fmt: skip
