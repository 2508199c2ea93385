"""The finished cards say what the leaderboard's results say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
SPEC = importlib.util.spec_from_file_location("benchmarks_cards", ROOT / "benchmarks" / "cards.py")
assert SPEC and SPEC.loader
cards = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cards)
FOUND = json.loads(cards.RESULTS.read_text())["tasks"][cards.TASK]
CHOSEN = cards.chosen(FOUND)


def test_each_variant_has_one() -> None:
    there = {path.stem for path in cards.CARDS.glob("*.md")}
    assert there - {"README", "template", "compressed"} == set(CHOSEN)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_card_has_the_results_numbers(name: str) -> None:
    _, runs = CHOSEN[name]
    wanted = cards.numbers(FOUND, runs)
    card = ModelCard.load(cards.CARDS / f"{name}.md")
    (result,) = (result for result in card.data.eval_results if result.metric_type == "accuracy")
    assert result.metric_value == wanted["metrics"]["accuracy"]
    assert f"| **this model** | {wanted['metrics']['accuracy']:.4g} |" in card.text
    for what, value in wanted["baselines"].items():
        assert f"| {what} | {value:.4g} |" in card.text
    for note in wanted["notes"]:
        assert note in card.text
    for what, value in wanted["training"].items():
        assert f"| {what} | {value} |" in card.text
