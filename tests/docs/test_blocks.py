"""Every block of Python in the pages and in the docstrings runs, on tiny models in the place of those that it names."""

import ast
import json
import random
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import words
from peft import get_peft_model
from peft import mapping as peft_mapping
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

import peftx
from peftx import registry

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
TRAINS = re.compile(r"\.train\(\)\n|\.train\(\)$|run_in_process\(|collect\(|train_dataset=")  # takes seconds
OPTIONAL = ("trl", "flwr", "bitsandbytes")

# wide enough for r = 64
WIDE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data, made once."""
    shelf = tmp_path_factory.mktemp("shelf")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(**WIDE, max_position_embeddings=128, pad_token_id=0, eos_token_id=63)
    bert = transformers.BertConfig(**WIDE, max_position_embeddings=64, num_labels=2)
    resnet = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    models = {
        "HuggingFaceTB/SmolLM2-135M": transformers.LlamaForCausalLM(llama),
        "bert-base-uncased": transformers.BertForSequenceClassification(bert),
        "microsoft/resnet-18": transformers.ResNetForImageClassification(resnet),
    }
    for name, model in models.items():
        model.save_pretrained(shelf / name)
        words().save_pretrained(shelf / name)
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(1, 60)}" for _ in range(6)) for _ in range(32)]
    (shelf / "data.csv").write_text("text,label\n" + "\n".join(f"{text},{i % 2}" for i, text in enumerate(texts)))
    pairs = [{"prompt": text, "completion": f" {text.split()[0]}"} for text in texts[:8]]
    (shelf / "chat.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return shelf


@pytest.fixture
def runner(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, dict], None]]:
    """Runs a piece of code in a folder of its own, with the shelf in it; what it registers is forgotten."""
    import datasets

    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    known, page = set(registry._METHODS), types.ModuleType("a_page_of_the_documentation")
    monkeypatch.setitem(sys.modules, page.__name__, page)  # dataclasses look their module up

    def run(code: str, names: dict[str, Any]) -> None:
        page.__dict__.update(names)
        exec(compile(code, page.__name__, "exec"), page.__dict__)

    yield run
    for name in set(registry._METHODS) - known:
        info = registry._METHODS.pop(name)
        for kind in ("CONFIG", "TUNER", "MIXED_MODEL", "PREFIX"):
            getattr(peft_mapping, f"PEFT_TYPE_TO_{kind}_MAPPING").pop(info.peft_type, None)


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def needs(code: str) -> list[str]:
    """Optional packages that a block imports, itself or by peftx."""
    asked = [name for name in OPTIONAL if re.search(rf"^\s*(from|import) {name}\b", code, re.MULTILINE)]
    asked += ["flwr"] * ("peftx.federated" in code) + ["bitsandbytes"] * ("load_in_4bit" in code)
    return [name for name in asked if find_spec(name) is None]


def marked(page: str) -> Any:
    slow = any(TRAINS.search(code) for code in blocks(page))
    return pytest.param(page, marks=pytest.mark.slow) if slow else page


@pytest.fixture
def reader(shelf: Path) -> dict[str, Any]:
    """What a page may take for granted: the README's data set."""
    tokenizer = AutoTokenizer.from_pretrained(shelf / "bert-base-uncased")
    return {"train_dataset": [{**tokenizer(f"w{i} w{i + 1}"), "label": i % 2} for i in range(1, 17)]}


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if blocks(page)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_blocks_of_a_page_run(page, runner, reader):
    ran = 0
    for code in blocks(page):
        if not needs(code):
            try:
                runner(code, reader)
            except Exception as error:
                raise AssertionError(f"{page}:\n{code}") from error
            ran += 1
    assert ran or all(needs(code) for code in blocks(page))


# Docstrings


def examples() -> dict[str, str]:
    """Indented blocks of docstrings that are Python, by module and name."""
    found = {}
    for path in sorted((ROOT / "peftx").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            doc = ast.get_docstring(node) or ""
            for match in re.finditer(r"(?:^ {4}\S.*\n?(?:^ {4,}.*\n?|^\n(?= {4}))*)", doc, re.MULTILINE):
                code = textwrap.dedent(match[0])
                if "(" not in code or re.search(
                    r"^(Args|Raises|Returns|Attributes):$", doc[: match.start()].rstrip().rsplit("\n", 1)[-1]
                ):
                    continue
                try:
                    ast.parse(code)
                except SyntaxError:
                    continue
                module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
                found[f"{module}.{getattr(node, 'name', '')}".rstrip(".")] = code
    return found


EXAMPLES = examples()
# What each takes for granted; the code of the others' lines is the same for all, see `world`.
SETUP = {
    "peftx.adapters.inference.inference": """
import torch, transformers
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, pad_token_id=0))
model = get_peft_model(model, peftx.GradNormLoRPConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
inputs = {"input_ids": torch.ones(1, 2, dtype=torch.long), "max_new_tokens": 2}
""",
    "peftx.compression": "from peftx.compression import collect, compress; dataset = data",
    "peftx.compression.callback.FisherCallback": "from peftx.compression import compress",
    "peftx.compression.hooks.Collector": """
from peftx.compression import target_layers
from peftx.compression.hooks import Collector
loader = [collator([{**row} for row in data[:4]])]
""",
    "peftx.federated.grid.InProcessGrid": """
from flwr.app import ArrayRecord
from peftx.federated import FedSVDStrategy, InProcessGrid, LocalSettings, global_state, make_client_app
def build_model(context):
    return get_peft_model(base(), peftx.FedSVDConfig(r=4, target_modules=["query"]))
client_app = make_client_app(build_model, lambda context: (data, collator), LocalSettings(steps=1, batch_size=8))
strategy = FedSVDStrategy(min_nodes=3)
arrays = ArrayRecord({name: tensor for name, tensor in global_state(build_model(None)).items()})
""",
    "peftx.optim.trainer.create_optimizer": "",
    "peftx.optim.trainer.trainer_kwargs": "",
    "peftx.pruning": "from peftx.pruning import score_dataset, select, subset; dataset = data",
    "peftx.pruning.callback.DonodCallback": "",
    "peftx.tuners.gradnormlorp.GradNormLoRPConfig": """
config = peftx.GradNormLoRPConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
model = get_peft_model(base(), config)
""",
    "peftx.tuners.triadaptlora.config.TriAdaptLoRAConfig": """
model = get_peft_model(base(), peftx.TriAdaptLoRAConfig(target_modules="all-linear", total_step=60))
step = 1
""",
}
QUICK = ("create_optimizer", "trainer_kwargs", "GradNormLoRPConfig", "TriAdaptLoRAConfig", "Collector", "inference")


@pytest.fixture
def world(shelf: Path, reader) -> dict[str, Any]:
    folder = shelf / "bert-base-uncased"

    def base() -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    names = {"peftx": peftx, "get_peft_model": get_peft_model, "Trainer": Trainer, "base": base, "folder": "saved"}
    names["model"] = get_peft_model(base(), peftx.ALLoRAConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names |= {"collator": DataCollatorWithPadding(tokenizer), "data": reader["train_dataset"]}
    names["args"] = TrainingArguments("out", num_train_epochs=1, use_cpu=True, disable_tqdm=True, report_to=[])
    return names


def test_every_example_of_a_docstring_is_known():
    assert set(EXAMPLES) == set(SETUP)


@pytest.mark.parametrize(
    "name", [name if name.endswith(QUICK) else pytest.param(name, marks=pytest.mark.slow) for name in SETUP]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_example_of_a_docstring_runs(name, runner, world):
    if "federated" in name:
        pytest.importorskip("flwr")
    runner(SETUP[name], world)
    runner(EXAMPLES[name], {})
