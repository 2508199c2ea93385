"""What `benchmarks/leaderboard.py` keeps and tells, where runs fail or are others than before."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import cards
import leaderboard

from peftx.train.comparison import Outcome


def run(method: str, seed: int = 0, accuracy: float = 0.8, steps: int = 9, **more: Any) -> dict[str, Any]:
    common = {"method_settings": {}, "learning_rate": 1e-3, "trained_values": {"adapter": 8, "whole_modules": 0}}
    common |= {"peak_memory": 1e6, "memory_of": "the process", "bytes": 32, "step_seconds": 0.5, "train_seconds": 5.0}
    samples = {"train": 50, "validation": 5, "eval": 100}
    eval_ = {"loss": 1.0, "accuracy": accuracy}
    return {**common, "method": method, "seed": seed, "steps": steps, "samples": samples, "eval": eval_, **more}


def found(*runs: dict[str, Any], failures: dict[str, str] | None = None) -> dict[str, Any]:
    group = {"runs": list(runs), "choices": [], "notes": [], "failures": failures or {}}
    return {"about": {"torch": "2"}, "tasks": {"mine": {"about": "a task", "groups": {"budget": group}}}}


@pytest.mark.parametrize(
    ("change", "kept"),
    [({}, True), ({"steps": 2}, False), ({"samples": {"train": 9, "validation": 5, "eval": 100}}, False)],
)
def test_only_runs_of_equal_length_stay_beside_new_ones(tmp_path: Path, change: dict, kept: bool) -> None:
    (tmp_path / "results.json").write_text("{}")
    before = {"runs": [run("bone", **change), run("lora", accuracy=0.1)]}
    new = Outcome([run("lora"), run("loldu")], [], [], {}, {})
    after = leaderboard.record(new, tmp_path, before)["runs"]
    assert [one["method"] for one in after] == ["lora", "loldu", *(["bone"] if kept else [])]
    assert after[0]["eval"]["accuracy"] == 0.8


def test_where_nothing_ran_the_reasons_stand(tmp_path: Path) -> None:
    results = found(failures={"lora": "no learning rate has a finite loss"})
    leaderboard.save(results, tmp_path / "leaderboard.json")
    page = (tmp_path / "leaderboard.md").read_text()
    assert "- lora did not run: no learning rate has a finite loss" in page and not list(tmp_path.glob("*.png"))


def test_without_lora_the_yardstick_is_named(tmp_path: Path) -> None:
    runs = [run(name, seed, accuracy) for name in ("bone", "loldu") for seed, accuracy in ((0, 0.8), (1, 0.7))]
    page = leaderboard.markdown(found(*runs, failures={"lora": "its process was killed"}))
    assert "| less bone's | step / bone |" in page and "LoRA's |" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--rates", ""], "learning_rates must be auto"),
    ],
)
def test_nonsense_is_not_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *own(tmp_path), *arguments])
    with pytest.raises((SystemExit, ValueError)) as error:
        leaderboard.main()
    assert message in capsys.readouterr().err + str(error.value)


def own(folder: Path) -> list[str]:
    lines = "".join(json.dumps({"text": f"a {i}", "label": "ab"[i % 2]}) + "\n" for i in range(20))
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(lines)
    files = [str(folder / f"{name}.jsonl") for name in ("train", "test")]
    return ["--own", "mine", "no-model", *files, "--kind", "SEQ_CLS", "--work", str(folder / "work")]


def test_a_damaged_file_of_results_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.json").write_text('{"tasks": ')
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", "--report", "--out", str(tmp_path / "mine.json")])
    with pytest.raises(SystemExit, match=r"mine.json is no results file .*move it away, or name another by --out"):
        leaderboard.main()


def test_cards_say_what_they_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(found(run("lora"))))
    for arguments, message in (
        (["--results", str(tmp_path / "mine.json")], "mine.json has no sst2"),
        (["--work", str(tmp_path / "nowhere")], "there is no .*nowhere.sst2"),
    ):
        monkeypatch.setattr(sys, "argv", ["cards.py", "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit, match=message):
            cards.main()
    assert not (tmp_path / "out").exists()
