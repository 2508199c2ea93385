"""Model and data, the same on every machine and offline: which half of the vocabulary is more frequent in a text?"""

import warnings

import torch
from flwr.app import Context
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import peftx
from peftx.federated import dirichlet_partition

warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is to go
TOKENS, LENGTH = 64, 12
BOTH = ("fedit", "flexlora", "fedex-lora")  # methods whose clients train A, too


def build_model(context: Context) -> PeftModel:
    """A classifier of random weights, in place of a pretrained one, with the adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        settings = {"vocab_size": TOKENS, "max_position_embeddings": LENGTH, "initializer_range": 0.2}
        base = BertForSequenceClassification(BertConfig(**settings, **sizes))
        adapter = LoraConfig if context.run_config["method"] in BOTH else peftx.FedSVDConfig
        return get_peft_model(
            base, adapter(r=4, lora_alpha=4, target_modules="all-linear", exclude_modules="classifier")
        )


def texts(size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    half = torch.rand(size, 1, generator=generator)  # how frequent the upper half is in each text
    upper = torch.rand(size, LENGTH, generator=generator) < half
    ids = torch.randint(0, TOKENS // 2, (size, LENGTH), generator=generator) + upper * (TOKENS // 2)
    return [{"input_ids": row, "labels": (row >= TOKENS // 2).float().mean().gt(0.5).long()} for row in ids]


def load_data(context: Context) -> tuple[list, None]:
    """This client's part of the texts, skewed by label; None: batches as `transformers.default_data_collator` does."""
    everything = texts(600, seed=1)
    labels = [int(row["labels"]) for row in everything]
    parts = dirichlet_partition(labels, int(context.run_config["clients"]), alpha=2.0, seed=0, min_size=64)
    return [everything[i] for i in parts[int(context.node_config["partition-id"])]], None


def evaluate(model: PeftModel, context: Context) -> dict[str, float]:
    """Accuracy and loss on texts of the server's own."""
    rows = texts(400, seed=2)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        found = model(**batch)
    accuracy = (found.logits.argmax(-1) == batch["labels"]).float().mean()
    return {"accuracy": accuracy.item(), "loss": found.loss.item()}
