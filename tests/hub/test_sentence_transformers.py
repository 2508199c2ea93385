"""Adapters in sentence-transformers: added, trained, saved and loaded as its own LoRA adapters are."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SMALL, Case, randomize, words

library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
datasets = pytest.importorskip("datasets")
losses = pytest.importorskip("sentence_transformers.losses")
modules = pytest.importorskip("sentence_transformers.models")
pytestmark = pytest.mark.sentence_transformers
TEXTS = ["w1 w2 w3", "w4 w5", "w7 w8 w9 w10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=64)).save_pretrained(path)
    words().save_pretrained(path)
    return path


def encoder(folder: Path) -> Any:
    body = modules.Transformer(str(folder))
    return library.SentenceTransformer(modules=[body, modules.Pooling(SMALL["hidden_size"])], device="cpu")


def adapted(case: Case, folder: Path) -> Any:
    torch.manual_seed(0)
    model = encoder(folder)
    model.add_adapter(case.config(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    return model


def test_saved_and_loaded(case: Case, folder: Path, tmp_path: Path) -> None:
    if case.info.model.uses_shared_state:
        with pytest.raises(Exception, match=r"get_peft_model|shared"):
            adapted(case, folder)
        return
    plain, model = encoder(folder), adapted(case, folder)
    randomize(model, case, std=0.3)
    model.eval()
    found = model.encode(TEXTS, convert_to_tensor=True)
    assert (found - plain.encode(TEXTS, convert_to_tensor=True)).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    loaded = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(loaded.encode(TEXTS, convert_to_tensor=True), found)
    model.disable_adapters()
    assert torch.equal(model.encode(TEXTS, convert_to_tensor=True), plain.encode(TEXTS, convert_to_tensor=True))


def test_trained(case: Case, folder: Path, tmp_path: Path) -> None:
    if case.info.model.uses_shared_state:
        return
    model = adapted(case, folder)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    pairs = [" ".join(f"w{int(i)}" for i in torch.randint(1, 60, (4,), generator=draw)) for _ in range(16)]
    arguments = library.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=0.02, report_to="none", disable_tqdm=True, use_cpu=True
    )
    run = library.SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"anchor": pairs, "positive": pairs[::-1]}),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[case.info.callback()] if case.info.callback else [],
    )
    run.remove_callback(transformers.PrinterCallback)
    run.train()
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved and all(case.info.prefix in key for key in moved)
    if case.info.name == "triadaptlora":
        ranks = [entry["triadaptlora_ranks"] for entry in run.state.log_history if "triadaptlora_ranks" in entry]
        assert sum(ranks[-1].values()) > sum(ranks[0].values())
