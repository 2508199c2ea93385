"""The output folder of a run: whether it may be written to, where it was interrupted, and what is written there."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..files import NEW, check_free, claim, files_in, is_by, note, publish, reached, read_list, save_list, written
from ..saved import METRICS
from .checkpoints import NAME, checkpoints, damage
from .settings import Settings, TrainSettings, parse, read_yaml, section

BY = "train"
SETTINGS = "settings.yaml"
FREE = ("training", "output", "resume", "overwrite")  # what may differ in a run that is resumed


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run writes, and what it goes on from.

    Attributes:
        folder: the output folder.
        where: what the Trainer writes to: `folder`, or a folder in it, where an earlier run is to be replaced: that
            one stays until the new one is whole.
        checkpoint: to resume from.
        damaged: newer checkpoints, which are passed over.
    """

    folder: Path
    where: Path
    checkpoint: Path | None = None
    damaged: tuple[Path, ...] = ()


def inputs(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("model", "data", "eval_data")}


def find_place(settings: TrainSettings) -> Place:
    """Where the run goes, checked before the work. Nothing is changed, but a move that was interrupted is finished.

    Raises:
        ValueError: the output is or holds what is read, is a file, or holds what nobody asked to replace; nothing
            whole to resume, or another run.
    """
    if settings.resume:
        return resumed(settings)
    folder = claim(settings.output, BY, inputs(settings), overwrite=settings.overwrite, ways="say overwrite or resume")
    earlier = is_by(folder, BY)
    found = [path for path in checkpoints(folder) if not earlier]
    if found:
        raise ValueError(f"{found[0]} is there already, and not by peftx {BY}: move it away, or name another folder")
    return Place(folder, folder / NEW if earlier else folder)


def resumed(settings: TrainSettings) -> Place:
    """The place of a run that goes on from its newest checkpoint that is whole."""
    folder = reached(settings.output, inputs(settings))
    where = interrupted(folder)
    found = checkpoints(where)
    if not found:
        raise ValueError(f"there is no checkpoint in {where} to resume from")
    check_same_run(settings, where / SETTINGS)
    listed = read_list(where)
    passed: list[tuple[Path, str]] = []
    for path in found:
        problem = damage(path, listed)
        if not problem:
            checkpoint = path
            break
        passed.append((path, problem))
    else:
        told = "; ".join(f"{path.name}: {problem}" for path, problem in passed)
        raise ValueError(f"no checkpoint in {where} is whole ({told}): start anew with overwrite")
    if listed:
        own = [name for name in listed if NAME.fullmatch(name.partition("/")[0])]
        open_ = tuple(name for name in own if name.endswith("/"))
        names = [f"{path.name}/{name}" for path in found for name in files_in(path)]
        for name in names:
            if name not in listed and not name.startswith(open_):
                raise ValueError(f"{where / name} is not by peftx {BY}, and old checkpoints are removed: move it away")
    for path, problem in passed:
        warnings.warn(f"{path.name} is damaged ({problem}): resuming from {checkpoint.name}", stacklevel=2)
    return Place(folder, where, checkpoint, tuple(path for path, _ in passed))


def interrupted(folder: Path) -> Path:
    """Where the run in an output folder that may be resumed is: one that was to replace another, else the folder."""
    return folder / NEW if (folder / NEW / SETTINGS).is_file() else folder


def check_names(place: Place, settings: TrainSettings, tokenizer: Any, whole: bool) -> None:
    """Raises ValueError where what the run will write is there already, and not its own, before the work.

    Args:
        whole: whether the model is saved, not an adapter.
    """
    names = {SETTINGS, METRICS, "README.md", "training_args.bin", *of_callbacks(settings)}
    if whole:
        names |= {"config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"}
        names |= {path.name for path in place.folder.glob("model-*-of-*.safetensors")}
    else:
        names |= {"adapter_config.json", "adapter_model.safetensors"}
    with tempfile.TemporaryDirectory() as draft:
        tokenizer.save_pretrained(draft)
        names |= set(files_in(Path(draft)))
    check_free(place.folder, names, BY)


def of_callbacks(settings: TrainSettings) -> list[str]:
    """The files of the callbacks that the settings ask for."""
    names = []
    if section(settings.prune) is not None:
        names += ["selection.json", "selection.md", "selection.png", "selection-scores.parquet"]
    if (fisher := section(settings.fisher)) is not None and fisher.get("output", "") is not None:
        names.append(Path(fisher.get("output", "fisher.safetensors")).name)
    return names


def begin(place: Place) -> None:
    """Clears what an interrupted run has left of a draft, and puts damaged checkpoints aside."""
    if place.checkpoint is None and place.where != place.folder and place.where.exists():
        shutil.rmtree(place.where)
    for path in place.damaged:
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        files = {n: e for n, e in read_list(place.where).items() if not n.startswith(f"{path.name}/")}
        save_list(place.where, files)
        note(place.where, [f"{aside.name}/{name}" for name in files_in(aside)], BY)


def end(place: Place) -> None:
    """Puts a run in the place of the one that it replaces."""
    if place.where == place.folder:
        return
    for path in place.where.glob("checkpoint-*/trainer_state.json"):  # which names the best checkpoint by its path
        here, there = (json.dumps(str(part))[1:-1] for part in (place.where, place.folder))
        path.write_text(path.read_text(encoding="utf-8").replace(here, there), encoding="utf-8")
    publish(place.where, place.folder, BY)


def check_same_run(settings: TrainSettings, path: Path) -> None:
    """A run is resumed as what it was; its `training` may change (transformers warns of what it minds)."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, so what the checkpoint belongs to is unknown: start anew with overwrite")
    before = parse(TrainSettings, read_yaml(path))
    for name in (f.name for f in dataclasses.fields(settings) if f.name not in FREE):
        ours, theirs = plain(getattr(settings, name)), plain(getattr(before, name))
        if ours != theirs:
            raise ValueError(f"{name} is {ours!r}, but the run to resume has {theirs!r}: say that, or start anew")


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings that are not at their default, as YAML holds them."""
    shown = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value != default:
            shown[f.name] = plain(value)
    return shown


def plain(value: Any) -> Any:
    """With lists for sets and tuples, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def write_settings(settings: TrainSettings, where: Path) -> None:
    """`settings.yaml`: what `peftx train --config` takes, and what a resumed run is compared with."""
    import yaml

    shown = {k: v for k, v in as_dict(settings).items() if k not in ("resume", "overwrite")}
    with written(where / SETTINGS, BY) as draft:
        draft.write_text(yaml.safe_dump(shown, sort_keys=False), encoding="utf-8")


class Record(TrainerCallback):
    """Writes the settings when the training starts, keeps the list of what the run wrote, and has the loss logged
    wherever it may end."""

    def __init__(self, settings: TrainSettings, place: Place) -> None:
        self.settings, self.place = settings, place

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.place.where.mkdir(parents=True, exist_ok=True)
            write_settings(self.settings, self.place.where)
            self.list_others()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True
        self.expect(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.expect(state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        if args.save_strategy == "best" and control.should_training_stop is False:
            self.expect(state, control, sure=False)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            where, name = self.place.where, f"checkpoint-{state.global_step}"
            files = read_list(where)
            kept = {n: e for n, e in files.items() if n != f"{name}/" and (where / n).exists()}  # old ones are gone
            save_list(where, kept)
            note(where, [f"{name}/{part}" for part in files_in(where / name)], BY)
            self.list_others()

    def expect(self, state: Any, control: Any, sure: bool = True) -> None:
        """Lists the checkpoint before it is written, so that half of it is known for ours."""
        if state.is_world_process_zero and (control.should_save or not sure):
            note(self.place.where, [f"checkpoint-{state.global_step}/"], BY)

    def list_others(self) -> None:
        """What the callbacks and loggers of the run wrote."""
        where = self.place.where
        names = of_callbacks(self.settings)
        names += [f"runs/{name}" for name in files_in(where / "runs")] if (where / "runs").is_dir() else []
        if names:
            note(where, names, BY)
