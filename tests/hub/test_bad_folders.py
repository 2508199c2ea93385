"""Folders that are no adapters: `peftx export` and `peftx inspect` say so in one line, and write nothing."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import peftx
from peftx.cli import app

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module", params=["lora", "bone"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is written as it is, and one that is put on its base model first."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model("llama").save_pretrained(folder / "base")
    base = type(tiny_model("llama")).from_pretrained(folder / "base")
    targets = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=2, **targets) if request.param == "lora" else peftx.BoneConfig(r=2, **targets)
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def tensors(change: Any) -> Any:
    def damage(folder: Path) -> None:
        found = change(load_file(folder / WEIGHTS))
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / WEIGHTS)

    return damage


def fields(**change: Any) -> Any:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | change))

    return damage


def page(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def in_place(name: str, make: Any) -> Any:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def pickled(folder: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {folder}/bomb",)

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))


HEADER = json.dumps(
    {"base_model.model.a.lora_A.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
)
DAMAGES = {
    "no tensors": tensors(lambda found: {}),
    "tensors of others": tensors(lambda found: {"x": torch.ones(2)}),
    "half of them": tensors(lambda found: dict([sorted(found.items())[0]])),
    "other shapes": tensors(lambda found: {key: torch.ones(5, 5) for key in found}),
    "no axes": tensors(lambda found: {key: torch.tensor(1.0) for key in found}),
    "integers": tensors(lambda found: {key: tensor.long() for key, tensor in found.items()}),
    "NaN": tensors(lambda found: {key: tensor * float("nan") for key, tensor in found.items()}),
    "strange names": tensors(lambda found: {f"base_model.model..{i}.lora_A": t for i, t in enumerate(found.values())}),
    "truncated": page(WEIGHTS, b"\x10\0\0\0\0\0\0\0{"),
    "empty": page(WEIGHTS, b""),
    "a header without end": page(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}"),
    "a huge shape": page(WEIGHTS, struct.pack("<Q", len(HEADER)) + HEADER.encode()),
    "a folder of weights": in_place(WEIGHTS, Path.mkdir),
    "a pipe of weights": in_place(WEIGHTS, os.mkfifo),
    "a pipe of a config": in_place(CONFIG, os.mkfifo),
    "a folder of a config": in_place(CONFIG, Path.mkdir),
    "a link to nothing": in_place(WEIGHTS, lambda path: path.symlink_to("nothing")),
    "a pickle": pickled,
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "an empty config": page(CONFIG, b""),
    "a config that is a list": page(CONFIG, b"[]"),
    "a config in Latin-1": page(CONFIG, '{"peft_type": "LORA", "x": "é"}'.encode("latin-1")),
    "a config without end": page(CONFIG, b"[" * 100_000),
    "no method": page(CONFIG, b"{}"),
    "a method of no text": fields(peft_type=["LORA"]),
    "an unknown method": fields(peft_type="LORAX"),
    "another method": fields(peft_type="VERA"),
    "a pattern that is none": fields(target_modules="*(["),
    "a number of targets": fields(target_modules=3),
    "another target": fields(target_modules=["nothing"]),
    "a rank of text": fields(r="x"),
    "a rank of none": fields(r=None),
    "a rank of a list": fields(r=[2]),
    "a rank of truth": fields(r=True),
    "a negative rank": fields(r=-1),
    "another rank": fields(r=4),
    "patterns that are a list": fields(rank_pattern=["q"]),
    "patterns of text": fields(rank_pattern={"q_proj": "x"}),
    "a broken pattern": fields(rank_pattern={"*q_proj": 3, "(": 2}),
    "a task that is a list": fields(task_type=["CAUSAL_LM"]),
    "a base that is a number": fields(base_model_name_or_path=3),
    "a base that is a list": fields(base_model_name_or_path=["a"]),
    "a revision that is a number": fields(revision=3),
    "a mapping that is text": fields(auto_mapping="x"),
    "modules that are a number": fields(modules_to_save=3),
}  # fmt: skip
HARMLESS = {("bone", "patterns of text"): "q"}  # Placeholder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_folder_is_one_error(whole: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(whole, folder)
    DAMAGES[damage](folder)
    before = sorted(tmp_path.rglob("*"))
    for command in (["export", folder, tmp_path / "out"], ["inspect", folder, "--load"],
                    ["export", folder, tmp_path / "out", "--to", "merged"]):  # fmt: skip
        outcome = CliRunner().invoke(app, [str(part) for part in command])
        assert isinstance(outcome.exception, SystemExit | None), (command, outcome.exception)
        assert "Traceback" not in outcome.output
        assert outcome.exit_code in (1, 2), (command, outcome.output)
        said = outcome.stderr if outcome.exit_code == 2 else outcome.stdout
        assert "problem: " in said if outcome.exit_code == 1 else said.count("\n") == 1 and said.startswith("peftx: ")
        assert sorted(tmp_path.rglob("*")) == before, command
    with pytest.raises((ValueError, NotImplementedError)):
        peftx.export_lora(folder, tmp_path / "out")
    assert not (folder / "bomb").exists()


def test_what_is_there_is_not_written_over(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for export in (peftx.export_lora, peftx.hub.export_merged):
        with pytest.raises(ValueError, match="file is a file: name a folder to write to"):
            export(whole, tmp_path / "file")
        for name in ("adapter_config.json", "config.json"):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).write_text("mine")
        with pytest.raises(ValueError, match="is there already, and not by peftx export|holds an adapter"):
            export(whole, tmp_path / "adapter_config.json" if export is peftx.export_lora else tmp_path / "config.json")
        for name in ("adapter_config.json", "config.json"):
            shutil.rmtree(tmp_path / name)
    outcome = CliRunner().invoke(app, ["export", str(whole), str(tmp_path / "file"), "--to", "merged"])
    assert outcome.exit_code == 2 and "is a file, not a folder" in outcome.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_replaces_only_an_export(whole: Path, tmp_path: Path) -> None:
    def call(*more: Any) -> Any:
        return CliRunner().invoke(app, ["export", str(whole), str(tmp_path / "out"), *more])

    assert call().exit_code == 0
    (tmp_path / "out" / "mine.json").write_text("mine")
    refused = call("--to", "merged")
    assert refused.exit_code == 2 and "is not empty: name another folder, or say --overwrite" in refused.stderr
    assert call("--overwrite").exit_code == 0
    (tmp_path / "out" / WEIGHTS).write_bytes(b"mine")
    refused = call("--overwrite")
    assert refused.exit_code == 2 and "has changed since peftx export wrote it" in refused.stderr
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == b"mine"
    base = Path(json.loads((whole / CONFIG).read_text())["base_model_name_or_path"])
    before = {path: path.read_bytes() for path in base.iterdir()}
    for place in (base, base.parent):
        for to in ("lora", "merged"):
            outcome = CliRunner().invoke(app, ["export", str(whole), str(place), "--to", to, "--overwrite"])
            assert outcome.exit_code == 2, (place, to, outcome.output)
    assert before == {path: path.read_bytes() for path in base.iterdir()}


def test_a_picture_replaces_only_a_picture(whole: Path, tmp_path: Path) -> None:
    def call(plot: Path, *more: str) -> Any:
        return CliRunner().invoke(app, ["inspect", str(whole), "--plot", str(plot), *more])

    (tmp_path / "mine.png").write_text("mine")
    for plot, message in (
        (tmp_path / "mine.png", "is there already, and not by peftx inspect"),
        (whole / WEIGHTS, "is there already, and not by peftx inspect"),
        (tmp_path / "no" / "x.png", "there is no folder"),
    ):
        outcome = call(plot, "--overwrite")
        assert outcome.exit_code == 2 and message in outcome.stderr
    for more in ((), ("--overwrite",)):
        assert call(tmp_path / "new.png", *more).exit_code == 0
    assert (tmp_path / "mine.png").read_text() == "mine"
