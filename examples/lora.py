"""Adapts a small Llama to private sentences with LoRA under a privacy budget, in one process.

    python examples/lora.py
    python examples/lora.py --short                 # a few seconds: shows that the script runs

Needs `pip install transformers peft`. The adapters are those of peft, on a Llama of transformers. Only the adapters
train, so only they get noise: the fewer trained parameters, the less noise in all. `examples/fsdp_lora.py` does the
same on several processes, with the model sharded among them.

Nothing has to be downloaded: the Llama is made here and learns, without privacy, sentences of one grammar, which stand
for public text. Then it is adapted to sentences of another grammar, which stand for people's own. To take a model of a
hub, replace `public_model()` by `LlamaForCausalLM.from_pretrained(...)`.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from privet import PrivacyEngine

DELTA = 1e-5
WORDS, LENGTH = 64, 16


def sentences(count: int, *, grammar: int, seed: int) -> Tensor:  # (count, LENGTH + 1)
    """Returns sentences in which each word is followed by one of two, which the grammar decides."""
    drawn = torch.Generator().manual_seed(seed)
    follows = torch.randint(WORDS, (WORDS, 2), generator=torch.Generator().manual_seed(grammar))
    words = [torch.randint(WORDS, (count,), generator=drawn)]
    for _ in range(LENGTH):
        words.append(follows[words[-1], torch.randint(2, (count,), generator=drawn)])
    return torch.stack(words, 1)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:  # ()
    """Returns the mean over sentences of each sentence's own mean loss."""
    scores = model(input_ids=ids[:, :-1], use_cache=False).logits.transpose(1, 2)  # (B, WORDS, T)
    return F.cross_entropy(scores, ids[:, 1:], reduction="none").mean(1).mean()


def public_model(steps: int) -> LlamaForCausalLM:
    """Returns a Llama that was trained on public sentences."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, sentences(128, grammar=1, seed=1000 + step)).backward()
        optimizer.step()
    return model


def main() -> None:
    """Trains, and prints what came of it."""
    parser = argparse.ArgumentParser(description="LoRA on a small Llama under a privacy budget.")
    parser.add_argument("--epsilon", type=float, default=8.0, help="the budget, at δ = 1e-5 (default: 8)")
    parser.add_argument("--short", action="store_true", help="fewer sentences, fewer steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    count, public_steps, epochs = (1024, 20, 2) if options.short else (8192, 200, 5)
    private, held_out = sentences(count, grammar=2, seed=2), sentences(512, grammar=2, seed=3)

    layers = ["q_proj", "v_proj", "o_proj", "down_proj"]
    model = get_peft_model(public_model(public_steps), LoraConfig(r=8, lora_alpha=16, target_modules=layers))
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),
        data_loader=DataLoader(TensorDataset(private), batch_size=512),
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=0.5,
    )

    def measured() -> float:
        model.eval()
        with torch.no_grad():
            found = loss_of(model, held_out).item()
        model.train()
        return found

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{parameters} trained parameters; loss on other sentences {measured():.3f} before")
    for epoch in range(1, epochs + 1):
        for (ids,) in loader:
            optimizer.zero_grad()
            loss_of(model, ids).backward()
            optimizer.step()
        print(
            f"epoch {epoch}: loss on other sentences {measured():.3f}, "
            f"ε = {engine.get_epsilon(delta=DELTA):.3f} at δ = {DELTA:g}"
        )


if __name__ == "__main__":
    main()
