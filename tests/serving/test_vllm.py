"""Exported adapters in vLLM: its tokens are those of transformers with peftx, for all methods at once.

Run before a release (`vllm_environment.py` says how); what it found is written to benchmarks/results/vllm.{json,md}.
"""

import json
import os
import subprocess
import time
import urllib.request
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, Case, randomize
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftx

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not {"SMOLLM2", "VLLM"} <= os.environ.keys(), reason="needs folders: SMOLLM2, a model; VLLM"),
]
RANK, TOKENS = 16, 24
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time, there was a"]
VARIANTS = [case for case in CASES if case.info.mergeable and case.info.name in {i.name for i in peftx.methods()}]
VARIANTS = [case for case in VARIANTS if case.info.config.__module__.startswith("peftx.")]
CUT = ("bone-bat", "gradnormlorp", "gradnormlorp-full")  # no plain LoRA: cut to RANK, compared as what they then are
Answers = list[tuple[list[int], list[float]]]


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]]) -> Answers:
    """Of each prompt TOKENS tokens and their log-probabilities, by transformers."""
    found = []
    for prompt in prompts:
        ids, cache, tokens, values = torch.tensor([prompt]), None, [], []
        for _ in range(TOKENS):
            output = model(ids, past_key_values=cache, use_cache=True)
            chances, cache = output.logits[0, -1].float().log_softmax(-1), output.past_key_values
            tokens.append(int(chances.argmax()))
            values.append(float(chances.max()))
            ids = torch.tensor([tokens[-1:]])
        found.append((tokens, values))
    return found


def make(case: Case, folder: Path, prompts: list[list[int]], plain: Answers) -> tuple[Answers, float]:
    """Exports an adapter of all linear layers with a delta large enough to change tokens; its answers, and the error
    of its export."""
    ranks = dict.fromkeys(case.info.rank_fields, 8)
    for std in (0.02, 0.1, 0.3):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(os.environ["SMOLLM2"])
        model = get_peft_model(base, case.config(target_modules="all-linear", task_type="CAUSAL_LM", **ranks)).eval()
        randomize(model, case, std=std)
        answers = greedy(model, prompts)
        if [tokens for tokens, _ in answers] != [tokens for tokens, _ in plain]:
            break
    errors = peftx.export_lora(model, folder, rank=RANK if case.name in CUT else None)
    if case.name in CUT:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(os.environ["SMOLLM2"]), folder).eval()
        answers = greedy(model, prompts)
    return answers, max(errors.values())


def compared(found: Answers, wanted: Answers) -> dict[str, float]:
    """Equal tokens up to the first that differs, of all, and the largest difference of their log-probabilities."""
    equal, worst = 0, 0.0
    for (tokens, values), (ours, chances) in zip(found, wanted, strict=True):
        same = next((i for i, pair in enumerate(zip(tokens, ours, strict=True)) if pair[0] != pair[1]), len(ours))
        equal += same
        worst = max([worst, *(abs(a - b) for a, b in zip(values[:same], chances[:same], strict=True))])
    return {"equal": equal, "of": TOKENS * len(wanted), "log-probability": worst}


def ask(url: str, body: dict | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read() or "{}")


def served(
    python: Path, adapters: dict[str, str], prompts: list[list[int]], work: Path, environ: dict[str, str]
) -> dict[str, Answers]:
    """The same by vLLM's OpenAI-compatible server, which this process starts and ends."""
    port, model = 8000 + os.getpid() % 20000, os.environ["SMOLLM2"]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", model, "--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(RANK)]
    command += ["--max-loras", str(len(adapters)), "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    found: dict[str, Answers] = {name: [] for name in ("base", *adapters)}
    with (
        (work / "server.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environ) as server,
    ):
        try:
            while True:
                assert server.poll() is None, (work / "server.log").read_text()[-3000:]
                try:
                    listed = {entry["id"] for entry in ask(f"http://127.0.0.1:{port}/v1/models")["data"]}
                    break
                except OSError:
                    time.sleep(1)
            assert listed == set(found)
            asked = {"max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
            asked["return_tokens_as_token_ids"] = True
            for name, answers in found.items():
                body = {"model": name, "prompt": prompts, **asked}
                for choice in ask(f"http://127.0.0.1:{port}/v1/completions", body)["choices"]:
                    tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
                    answers.append((tokens, choice["logprobs"]["token_logprobs"]))
        finally:
            server.terminate()
            server.wait()
    return found


def test_tokens_are_those_of_transformers(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(os.environ["SMOLLM2"])
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    wanted = {"base": greedy(AutoModelForCausalLM.from_pretrained(os.environ["SMOLLM2"]), prompts)}
    adapters, lost = {}, {}
    for case in VARIANTS:
        adapters[case.name] = str(tmp_path / case.name)
        wanted[case.name], lost[case.name] = make(case, tmp_path / case.name, prompts, wanted["base"])
    jobs = {"model": os.environ["SMOLLM2"], "adapters": adapters, "prompts": prompts, "rank": RANK, "tokens": TOKENS}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    python = Path(os.environ["VLLM"], "bin", "python")
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"VLLM_NO_USAGE_STATS": "1"}
    environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process: none is left over
    side = [python, HERE / "vllm_side.py", tmp_path / "jobs.json", tmp_path / "answers.json"]
    done = subprocess.run(side, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    by_class = json.loads((tmp_path / "answers.json").read_text())
    by_server = served(python, adapters, prompts, tmp_path, environ)
    rows = {
        name: {
            "class": compared(by_class["answers"][name], wanted[name]),
            "server": compared(by_server[name], wanted[name]),
            "of the base": compared(wanted["base"], wanted[name])["equal"],
            "export": lost.get(name, 0.0),
        }
        for name in wanted
    }
    mine = {package: version(package) for package in ("torch", "transformers", "peft")}
    report = {"date": str(date.today()), "model": "SmolLM2-135M-Instruct, fp32, CPU", "vllm": by_class["versions"]}
    write(report | {"reference": {"peftx": peftx.__version__, **mine}, "rows": rows})
    for name, row in rows.items():
        assert row["class"]["equal"] == row["server"]["equal"] == row["class"]["of"], (name, row)
        assert max(row["class"]["log-probability"], row["server"]["log-probability"]) < 5e-3, (name, row)
        assert name == "base" or row["of the base"] < row["class"]["of"], (name, row)


def write(report: dict[str, Any]) -> None:
    lines = [
        f"{report['model']}, {report['date']}. vLLM: {told(report['vllm'])}. Reference: {told(report['reference'])}.",
        "",
        f"Greedy, {TOKENS} tokens of {len(PROMPTS)} prompts, random deltas on all seven linear layers, all adapters "
        "loaded at once: tokens equal to those of transformers with peftx, and the largest difference of their "
        f"log-probabilities, in the Python class and in the OpenAI-compatible server. {', '.join(CUT)} are cut to rank "
        f"{RANK} and compared with stock PEFT on the exported file. The base is asked in a batch of its own: in one "
        "with adapters, vLLM on a CPU adds the last adapter to it (vllm#48421).",
        "",
        "| adapter | class | | server | | equal to the base's | error of the export |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in report["rows"].items():
        ways = (row["class"], row["server"])
        cells = [f"{way['equal']} of {way['of']} | {way['log-probability']:.1e}" for way in ways]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['of the base']} | {row['export']:.2g} |")
    results = HERE.parents[1] / "benchmarks" / "results"
    (results / "vllm.json").write_text(json.dumps(report, indent=1) + "\n")
    (results / "vllm.md").write_text("\n".join(lines) + "\n")


def told(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
