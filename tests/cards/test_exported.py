"""What is exported carries a card that says what it came from; a user's own stays."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import tiny_model
from huggingface_hub import ModelCard
from peft import PeftModel

import peftx
from peftx.cards.adapter import description
from peftx.cards.labels import MOST, labels_on, named_labels, with_labels
from peftx.files import read_list
from peftx.hub import export_merged, export_miss, finish_card

LABELS = ("calm", "a | b `c`", "cross")
SHOWN = "## Labels\n\n0 `calm`, 1 `` a | b `c` ``, 2 `cross`\n\n"
TAG = "base_model:adapter:owner/base"


def adapter(folder: Path, method: str = "bone", kind: str = "llama") -> tuple[Any, Path]:
    """A model with an adapter on `owner/base`, and the adapter's folder."""
    base = tiny_model(kind)
    base.config._name_or_path = base.name_or_path = "owner/base"
    if kind == "bert":
        base.config.id2label = dict(enumerate(LABELS))
    task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[kind]
    config = {"bone": peftx.BoneConfig, "dora": peftx.GradNormLoRPConfig, "loldu": peftx.LoLDUConfig}[method]
    model = peft.get_peft_model(base, config(r=2, target_modules=["query", "q_proj"], task_type=task))
    model.save_pretrained(folder / "my-adapter")
    return model, folder / "my-adapter"


def test_a_card_says_what_an_export_costs(case: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model("llama"), case.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    text = "\n".join(description(case.info, model.peft_config["default"]))
    try:  # to the adapter's own rank
        peftx.export_lora(model, tmp_path / "plain")
    except NotImplementedError:
        assert "equal outputs" not in text
    else:
        assert "with equal outputs, which needs no peftx" in text and case.lora_export in ("exact", "dora")


def code_of(card: ModelCard) -> str:
    return card.text.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("method", ["bone", "dora", "loldu"])
def test_a_plain_lora_says_what_it_came_from(method: str, tmp_path: Path) -> None:
    model, source = adapter(tmp_path, method)
    peftx.export_lora(model if method == "loldu" else source, tmp_path / "plain", base_model=tiny_model("llama"))
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    info = next(info for info in peftx.methods() if info.config is type(model.peft_config["default"]))
    assert card.data.library_name == "peft" and card.data.base_model == "owner/base"
    assert card.data.base_model_relation == "adapter" and card.data.pipeline_tag == "text-generation"
    assert {"peft", "peftx", "dora" if method == "dora" else "lora", TAG} == set(card.data.tags)
    assert info.summary in card.text and f"eprint = {{{info.paper.removeprefix('arXiv:')}}}" in card.text
    assert "| base model | `owner/base` |" in card.text and "| `r` | `2` |" in card.text
    assert ("| adapter | `my-adapter` |" in card.text) == (method != "loldu")  # one in memory has no name
    assert str(tmp_path) not in card.text and "equal to the adapter's" in card.text


def test_the_code_on_it_needs_no_peftx(tmp_path: Path) -> None:
    model, _ = adapter(tmp_path)
    model.base_model.model.model.layers[0].self_attn.q_proj.adapters["default"].block.data.normal_()
    peftx.export_lora(model, tmp_path / "plain")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    code = code_of(ModelCard.load(tmp_path / "plain" / "README.md"))
    assert "peftx" not in code and 'AutoModelForCausalLM.from_pretrained("owner/base")' in code
    names = {"owner/base": tmp_path / "base", "path/or/name of this adapter": tmp_path / "plain"}
    for name, place in names.items():
        code = code.replace(name, str(place))
    found: dict[str, Any] = {}
    exec(code, found)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        assert isinstance(found["model"], PeftModel)
        wanted = model.eval()(ids).logits
        torch.testing.assert_close(found["model"].eval()(ids).logits, wanted, atol=1e-5, rtol=1e-4)


def test_an_error_is_told(tmp_path: Path) -> None:
    model, _ = adapter(tmp_path)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.adapters["default"].block.data.normal_()
    worst = max(peftx.export_lora(model, tmp_path / "plain", rank=1).values())
    assert worst > 0
    text = (tmp_path / "plain" / "README.md").read_text()
    assert f"a relative error of up to {worst:.2g}" in text and "are equal" not in text


def test_miss_and_merged(tmp_path: Path) -> None:
    _, source = adapter(tmp_path)
    export_miss(source, tmp_path / "miss")
    export_merged(source, tmp_path / "merged", base_model=tiny_model("llama"))
    miss, merged = (ModelCard.load(tmp_path / name / "README.md") for name in ("miss", "merged"))
    assert {"miss", "peft", "peftx", TAG} == set(miss.data.tags) and "# MiSS adapter of owner/base" in miss.text
    assert merged.data.library_name == "transformers" and merged.data.base_model_relation == "finetune"
    assert merged.data.base_model == "owner/base" and "peft:method:bone" in merged.data.tags
    assert (
        code_of(merged).startswith("from transformers import AutoModelForCausalLM\n") and "## Size" not in merged.text
    )
    assert all("| adapter | `my-adapter` |" in card.text for card in (miss, merged))


def test_labels_stand_first(tmp_path: Path) -> None:
    model, source = adapter(tmp_path, kind="bert")
    base = tiny_model("bert")
    base.config.id2label = dict(enumerate(LABELS))
    peftx.export_lora(model, tmp_path / "of-memory")
    peftx.export_lora(source, tmp_path / "of-folder", base_model=tiny_model("bert"))
    export_merged(source, tmp_path / "merged", base_model=base)
    for folder in (source, tmp_path / "of-memory", tmp_path / "of-folder", tmp_path / "merged"):
        assert ModelCard.load(folder / "README.md").text.lstrip().startswith(SHOWN), folder.name
    unnamed = tiny_model("bert")
    unnamed.config.num_labels = len(LABELS)
    export_merged(source, tmp_path / "of-card", base_model=unnamed)
    config = json.loads((tmp_path / "of-card" / "config.json").read_text())
    assert tuple(config["id2label"].values()) == LABELS and config["label2id"] == {n: i for i, n in enumerate(LABELS)}
    model.save_pretrained(source)  # again
    finish_card(source, metrics={"accuracy": 0.5}, dataset="owner/data")
    text = ModelCard.load(source / "README.md").text
    assert text.lstrip().startswith(f"{SHOWN}## Load this adapter") and text.count("## Labels") == 1
    finish_card(source, metrics={"accuracy": 0.5}, dataset="owner/data", labels=["x", "y", "z"])
    text = ModelCard.load(source / "README.md").text
    assert text.lstrip().startswith("## Labels\n\n0 `x`, 1 `y`, 2 `z`\n\n## Load") and text.count("## Labels") == 1
    with pytest.raises(ValueError, match="labels must be the names"):
        finish_card(source, metrics={"accuracy": 0.5}, dataset="owner/data", labels="xyz")


def test_made_up_labels_are_none() -> None:
    assert (
        named_labels({"id2label": {0: "LABEL_0", 1: "LABEL_1"}})
        == ()
        == named_labels({})
        == named_labels({"id2label": 3})
    )
    assert named_labels({"id2label": {"1": "no", "0": "yes"}}) == ("yes", "no")
    assert named_labels({"id2label": {"0": "yes", "7": "no"}}) == ()
    for names in (LABELS, ("a, b", "1 `x`, 2 `y`"), ("one",)):
        assert labels_on(with_labels("text", names)) == names
    assert labels_on("text") == labels_on("## Labels\n\n0 `a`, 2 `b`\n") == labels_on("## Labels\n\nby hand\n") == ()
    code = 'base_model = Auto.from_pretrained("a/b", num_labels=2)'
    named = with_labels(code, ['say "no"', "yes"])
    assert eval(re.search(r"id2label=(.*)", named)[1]) == {0: 'say "no"', 1: "yes"} and "num_labels" not in named
    assert with_labels(f"## Labels\n\n0 `no`, 1 `yes`\n\n{code}", ()).endswith('id2label={0: "no", 1: "yes"}\n)')
    assert code in with_labels(code, ["`", "b"]) and code in with_labels(code, list("abc"))
    many = with_labels("text", [f"class {i}" for i in range(MOST + 2)])
    assert f"{MOST - 1} `class {MOST - 1}`, and 2 more\n\ntext" in many
    assert labels_on(many) == ()
    assert with_labels(many, ["a"]) == "## Labels\n\n0 `a`\n\ntext"


@pytest.mark.parametrize("changed", [False, True])
def test_a_card_of_the_users_stays(changed: bool, tmp_path: Path) -> None:
    model, _ = adapter(tmp_path)
    card = tmp_path / "plain" / "README.md"
    card.parent.mkdir()
    if changed:  # what an export wrote, by hand
        peftx.export_lora(model, card.parent)
        card.write_text(card.read_text() + "A line of mine.\n")
    else:
        card.write_text("# Mine\n")
    before = card.read_text()
    peftx.export_lora(model, card.parent)
    peftx.export_lora(model, card.parent)
    assert card.read_text() == before and "README.md" not in read_list(card.parent)
    assert (card.parent / "adapter_model.safetensors").is_file()


def test_an_export_replaces_its_own_card(tmp_path: Path) -> None:
    for method in ("bone", "loldu"):
        peftx.export_lora(adapter(tmp_path / method, method)[0], tmp_path / "plain")
    assert "LoLDU" in (tmp_path / "plain" / "README.md").read_text()
