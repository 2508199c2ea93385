"""ALLoRA, LoRA-GGPO, LoRA-MGPO and TriAdaptLoRA: in a loop of your own, in `Trainer`, and out as plain LoRA.

Run it as it stands: `python examples/training_rules.py [folder]`. A tiny random Llama learns to count, offline.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peftx

warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, use_cache=False, **sizes))


def batch(step: int, size: int = 16) -> torch.Tensor:
    """Rows that count upwards from anywhere."""
    start = torch.randint(32, (size, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(16)) % 32


def loop(config: peft.PeftConfig, steps: int = 60) -> peft.PeftModel:
    """A plain PyTorch loop, with each rule's one call per step."""
    model = peft.get_peft_model(base(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tuner = model.base_model
    if getattr(config, "mode", None) == "mgpo":
        tuner.attach_optimizer(optimizer)
    for step in range(1, steps + 1):
        rows = batch(step)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        if isinstance(config, peftx.LoRAGGPOConfig):
            tuner.update_ggpo_stats()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(config, peftx.TriAdaptLoRAConfig):
            tuner.update_and_grow(step)
    print(f"{config.peft_type.value}: loss {loss.item():.3f} after {steps} steps")
    return model.eval()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for config in (
        peftx.ALLoRAConfig(r=4, **TARGETS),
        peftx.LoRAGGPOConfig(r=4, **TARGETS),
        peftx.LoRAGGPOConfig(r=4, mode="mgpo", **TARGETS),
    ):
        loop(config)
    model = loop(peftx.TriAdaptLoRAConfig(target_r=4, total_step=60, **TARGETS))
    peftx.plot_ranks(model.base_model.rank_history(), folder / "ranks.png")
    peftx.export_lora(model, folder / "plain-lora")
    plain = peft.PeftModel.from_pretrained(base(), folder / "plain-lora").eval()
    rows = batch(0)
    with torch.no_grad():
        difference = (plain(input_ids=rows).logits - model(input_ids=rows).logits).abs().max()
    print(f"As plain LoRA, ranks {sorted(set(model.base_model.ranks().values()))}: logits differ by {difference:.0e}")

    model = peft.get_peft_model(base(), peftx.TriAdaptLoRAConfig(target_r=4, **TARGETS))
    settings = {"max_steps": 30, "learning_rate": 1e-2, "report_to": [], "dataloader_pin_memory": False}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder / "trainer"), **settings),
        train_dataset=[{"input_ids": row, "labels": row} for row in batch(1, 240)],
        callbacks=[peftx.TriAdaptCallback()],  # LoRA-GGPO: peftx.GGPOCallback(); ALLoRA needs none
    )
    trainer.train()
    print(f"In Trainer: ranks {sorted(model.base_model.ranks().values())}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
