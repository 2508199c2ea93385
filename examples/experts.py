"""Adapters on the experts of a mixture of experts: a tiny Qwen3-MoE with random weights. It runs as it stands."""

import warnings

import peft
import torch
import transformers

import peftx

warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "v_proj"]
STEPS = 40

config = transformers.Qwen3MoeConfig(
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
    num_experts=8,
    num_experts_per_tok=2,
)
ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


def base_model():
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config)


targets = dict(task_type="CAUSAL_LM", target_modules=ATTENTION, target_parameters=EXPERTS)
for adapter in (
    peftx.ALLoRAConfig(r=8, **targets),
    peftx.BoneConfig(r=8, **targets),
    peftx.FloraConfig(r=8, **targets),
):
    model = peft.get_peft_model(base_model(), adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trained = model.get_nb_trainable_parameters()[0]
    print(f"{adapter.peft_type.value}: {trained:,} trained values, loss {losses[0]:.2f}, then {losses[-1]:.2f}")

# The last one, FLoRA, as a file that stock PEFT loads.
model.eval()
peftx.export_lora(model, "outputs/experts/flora-as-lora")
stock = peft.PeftModel.from_pretrained(base_model(), "outputs/experts/flora-as-lora").eval()
with torch.no_grad():
    print(f"as LoRA: outputs differ by {(stock(ids).logits - model(ids).logits).abs().max():.1e}")

# That file is PEFT's own LoRA: one call gives it the factored forward.
with torch.no_grad():
    before = stock(ids).logits
    layers = peftx.fast_experts(stock)
    print(f"fast_experts: {layers} layers, outputs differ by {(stock(ids).logits - before).abs().max():.1e}")
