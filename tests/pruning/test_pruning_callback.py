"""DonodCallback inside real Trainers: the training is exactly that of a Trainer that was given the kept samples."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import tiny_model, words
from processes import join, leave
from transformers import Trainer, TrainerCallback, TrainingArguments

import peftx
from peftx.pruning import METHODS, Selection, fingerprint, prune, score_dataset, select
from peftx.pruning.scores import score_share
from peftx.pruning.warmup import warmed_up, warmup_length

COUNT = 40


def examples(count: int = COUNT) -> list[dict[str, Any]]:
    """Token rows that are told apart by their first two tokens, with a masked start."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (count, 8), generator=generator)
    ids[:, 0] = torch.arange(count) % 60 + 1
    return [{"input_ids": row, "labels": torch.cat([torch.full((3,), -100), row[3:]])} for row in ids]


def classes(count: int = COUNT) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"], "labels": torch.tensor(i % 3)} for i, row in enumerate(examples(count))]


class Watch(TrainerCallback):
    """What is trained on, and with which rate."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.rates: list[float] = []

    def watch(self, model: torch.nn.Module) -> None:
        def hook(module, args, kwargs):
            if module.training:
                self.seen += (kwargs["input_ids"][:, 0] - 1).tolist()

        model.register_forward_pre_hook(hook, with_kwargs=True)

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **settings})


def trainer(
    folder: Path, *callbacks: Any, kind: str = "llama", data: Any = None, cls: Any = Trainer, **settings
) -> Trainer:
    model = tiny_model(kind)
    watch = Watch()
    watch.watch(model)
    data = (examples() if kind == "llama" else classes()) if data is None else data
    run = cls(model, arguments(folder, **settings), train_dataset=data, callbacks=[watch, *callbacks])
    run.remove_callback(transformers.PrinterCallback)
    run.watch = watch
    return run


def parameters(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize(("method", "when"), [*((name, "start") for name in METHODS), ("donod", "warmup")])
def test_training_is_exactly_that_on_the_kept_samples(tmp_path: Path, method: str, when: str) -> None:
    callback = peftx.DonodCallback(keep=0.25, method=method, when=when, batch_size=8)
    pruned = trainer(tmp_path / "a", callback)
    start = parameters(pruned)
    data = pruned.train_dataset
    before = copy.deepcopy(data)
    pruned.train()
    kept = callback.selection.indices
    assert len(kept) == 10
    assert pruned.state.global_step == pruned.state.max_steps == 6
    assert pruned.state.epoch == 2 and set(pruned.watch.seen) >= set(kept) and pruned.watch.rates[-1] == 0
    assert sorted(pruned.watch.seen[-20:]) == sorted(kept * 2)
    assert pruned.train_dataset is data and str(data) == str(before)

    by_hand = trainer(tmp_path / "b", data=[examples()[i] for i in kept])
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters(by_hand).items())
    by_hand.train()
    for name, tensor in parameters(by_hand).items():
        assert torch.equal(tensor, parameters(pruned)[name]), name
    assert by_hand.watch.rates == pruned.watch.rates


@pytest.mark.parametrize("don_goal", ["min", "max"])
def test_the_choice_is_that_of_the_pure_functions(tmp_path: Path, don_goal: str) -> None:
    callback = peftx.DonodCallback(keep=0.3, don_goal=don_goal, weights=(0.7, 0.3), eta=0.01)
    run = trainer(tmp_path, callback)
    scores = score_dataset(run.model, examples(), eta=0.01)
    run.train()
    assert callback.selection.indices == select(scores, 0.3, don_goal=don_goal, weights=(0.7, 0.3))
    torch.testing.assert_close(callback.selection.scores["don"], scores["don"], rtol=1e-4, atol=1e-9)


def test_gradient_accumulation_and_group_by_length(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "group_by_length"}
    callback = peftx.DonodCallback(keep=0.3)
    run = trainer(tmp_path, callback, **settings)
    run.train()
    assert run.state.global_step == run.state.max_steps == 4
    assert sorted(run.watch.seen) == sorted(callback.selection.indices * 2) and run.watch.rates[-1] == 0


def test_classifiers_warm_up_by_default_and_are_set_back(tmp_path: Path) -> None:
    callback = peftx.DonodCallback(keep=0.5)
    run = trainer(tmp_path, callback, kind="bert")
    run.model.classifier.bias.grad = torch.ones(3)
    start, rng = parameters(run), torch.get_rng_state()
    run.get_train_dataloader()
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters(run).items())
    assert torch.equal(run.model.classifier.bias.grad, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), rng)
    assert callback.selection.key["settings"]["when"] == "warmup"
    cold = score_dataset(run.model, classes(), metrics=["loss"])["loss"]
    assert callback.selection.scores["loss"].mean() < cold.mean()


@pytest.mark.parametrize(
    ("count", "batch", "steps"), [(40, 4, 10), (400, 2, 200), (800, 2, 200), (8000, 2, 400), (3, 4, 1)]
)
def test_length_of_the_warm_up(count: int, batch: int, steps: int) -> None:
    assert warmup_length(count, batch) == steps


def test_warm_up_needs_something_that_trains_and_a_loss() -> None:
    model = tiny_model("llama")
    collator = transformers.default_data_collator
    unlabelled = [{"input_ids": row["input_ids"]} for row in examples()]
    with (
        pytest.raises(ValueError, match="made no tensor 'labels', only input_ids"),
        warmed_up(model, unlabelled, collator, steps=2, learning_rate=0.1),
    ):
        pass
    with (
        pytest.raises(ValueError, match="none of its parameters requires a gradient"),
        warmed_up(model.requires_grad_(False), examples(), collator, steps=2, learning_rate=0.1),
    ):
        pass


def test_adapters(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    callback = peftx.DonodCallback(keep=0.5, method="grand_full")
    run = Trainer(model, arguments(tmp_path), train_dataset=examples(), callbacks=[callback])
    run.train()
    assert run.state.global_step == 10 and callback.selection.scores["grand_full"].std() > 0


def test_datasets_are_selected_with_their_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {name: [row[name].tolist() for row in examples()] for name in ("input_ids", "labels")}
    data = datasets.Dataset.from_dict({**columns, "text": [f"number {i}" for i in range(COUNT)]})
    callback = peftx.DonodCallback(keep=0.25)
    run = trainer(tmp_path, callback, data=data)
    run.train()
    assert run.state.global_step == 6 and len(data) == COUNT
    assert sorted(run.watch.seen) == sorted(callback.selection.indices * 2)
    assert "number" in (tmp_path / "selection.md").read_text()


def test_files(tmp_path: Path) -> None:
    callback = peftx.DonodCallback(keep=0.25)
    trainer(tmp_path, callback).train()
    stored = json.loads((tmp_path / "selection.json").read_text())
    assert stored["indices"] == callback.selection.indices
    assert stored["key"]["data"] == fingerprint(examples()) and stored["key"]["model"] == "LlamaForCausalLM"
    assert stored["key"]["settings"]["keep"] == 0.25 and len(stored["scores"]["don"]) == COUNT
    assert "10 of 40 samples kept by donod" in (tmp_path / "selection.md").read_text()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")

    quiet = tmp_path / "quiet"
    trainer(quiet, peftx.DonodCallback(keep=0.25, report=False)).train()
    assert {path.name for path in quiet.iterdir()} == {"selection.json", ".peftx.json"}


def test_texts_are_not_published(tmp_path: Path) -> None:
    run = trainer(tmp_path, peftx.DonodCallback(keep=0.25))
    run.args.push_to_hub = True
    run.get_train_dataloader()
    run.callback_handler.callbacks[-1].on_train_begin(run.args, run.state, run.control)
    assert {path.name for path in tmp_path.iterdir()} == {"selection.json", ".peftx.json"}


def no_scoring(*_: Any, **__: Any) -> None:
    raise AssertionError("scored again")


def test_a_stored_selection_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = peftx.DonodCallback(keep=0.25)
    run = trainer(tmp_path, first)
    run.train()
    monkeypatch.setattr("peftx.pruning.callback.score_share", no_scoring)
    run.train()  # the same trainer
    second = peftx.DonodCallback(keep=0.25)
    trainer(tmp_path, second).train()  # another one
    assert second.selection.indices == first.selection.indices
    torch.testing.assert_close(second.selection.scores, first.selection.scores, rtol=0, atol=0)
    with pytest.raises(AssertionError, match="scored again"):
        trainer(tmp_path, peftx.DonodCallback(keep=0.25, overwrite=True)).train()


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"keep": 0.5}, None, r"made for other settings \(settings .*'keep': 0.25.*now .*'keep': 0.5"),
        ({"don_goal": "max"}, None, "made for other settings"),
        ({}, examples(30), "made for other data"),
        ({}, examples()[::-1], "made for other data"),
    ],
)
def test_a_selection_of_something_else_is_refused(tmp_path: Path, settings: dict, data: Any, message: str) -> None:
    trainer(tmp_path, peftx.DonodCallback(keep=0.25)).train()
    before = (tmp_path / "selection.json").read_bytes()
    run = trainer(tmp_path, peftx.DonodCallback(**{"keep": 0.25, **settings}), data=data)
    start = parameters(run)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert (tmp_path / "selection.json").read_bytes() == before
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters(run).items())


def test_the_data_of_a_trainer_may_change(tmp_path: Path) -> None:
    callback = peftx.DonodCallback(keep=0.25, overwrite=True)
    run = trainer(tmp_path, callback)
    run.train()
    run.train_dataset = examples()[::-1]
    run.train()
    assert callback.selection.key["data"] == fingerprint(examples()[::-1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: file.update(format=9), "format 9 instead of 1"),
        (lambda file: file.update(indices=[3, 1]), "indices must be ascending"),
        (lambda file: file.update(indices=[3, 3]), "indices must be ascending"),
        (lambda file: file.update(indices=[40]), "from 0 to 39"),
        (lambda file: file.update(indices=[-1]), "from 0 to 39"),
        (lambda file: file.update(indices=[]), "indices must be ascending"),
        (lambda file: file.update(indices=[1.0]), "indices must be integers"),
        (lambda file: file.update(indices=None), "not a selection"),
        (lambda file: file.pop("key"), "no 'key'"),
        (lambda file: file["scores"].update(don=[1.0]), "don: not one score for each of the 40"),
        (lambda file: file["scores"].update(don=[[1.0]] * 40), "don: not one score for each of the 40"),
        (lambda file: file["scores"].update(don=["a"] * 40), "not a selection"),
    ],
)
def test_a_broken_selection_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    scores = {"don": torch.arange(40.0).double(), "nod": torch.ones(40).double()}
    path = tmp_path / "selection.json"
    Selection([1, 2], scores, {"data": {"samples": 40, "fingerprint": ""}}).save(path)
    Selection.load(path)
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=reason):
        Selection.load(path)


def test_a_folder_is_not_a_selection(tmp_path: Path) -> None:
    (tmp_path / "selection.json").mkdir()
    with pytest.raises(ValueError, match="selection.json is not a selection of peftx"):
        trainer(tmp_path, peftx.DonodCallback()).train()


def test_a_selection_survives_its_file(tmp_path: Path) -> None:
    scores = {"don": torch.tensor([0.1, float("nan"), 1 / 3], dtype=torch.float64)}
    key = {"data": {"samples": 3, "fingerprint": "x"}, "settings": {"weights": [0.5, 0.5]}}
    path = tmp_path / "new" / "selection.json"
    Selection([0, 2], scores, key).save(path)
    found = Selection.load(path)
    torch.testing.assert_close(found.scores, scores, rtol=0, atol=0, equal_nan=True)
    assert found.indices == [0, 2]
    found.check({**key, "settings": {"weights": (0.5, 0.5)}}, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["selection.json"]


def test_fingerprints() -> None:
    data = examples()
    assert fingerprint(data) == fingerprint(copy.deepcopy(data))
    assert fingerprint(data) != fingerprint(data[::-1]) and fingerprint(data) != fingerprint(data[:-1])
    for place in (0, COUNT - 1):
        changed = copy.deepcopy(data)
        changed[place]["labels"][4] += 1
        assert fingerprint(data) != fingerprint(changed)
    large = list(range(5000))
    assert fingerprint(large) == fingerprint(list(range(5000)))
    assert fingerprint(large) != fingerprint([*large[:-1], 0])


def test_resume_is_bit_equal_to_the_uninterrupted_run(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path, peftx.DonodCallback(keep=0.25), **settings)
    whole.train()
    callback = peftx.DonodCallback(keep=0.25)
    resumed = trainer(tmp_path, callback, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == resumed.state.max_steps == 6
    assert set(resumed.watch.seen) <= set(callback.selection.indices)
    for name, tensor in parameters(whole).items():
        assert torch.equal(tensor, parameters(resumed)[name]), name
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # the same trainer again


def test_resuming_without_the_selection_is_refused(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, peftx.DonodCallback(keep=0.25), **settings).train()
    (tmp_path / "selection.json").unlink()
    resumed = trainer(tmp_path, peftx.DonodCallback(keep=0.25), **settings)
    with pytest.raises(ValueError, match=r"resumes at step 4, but its selection is not there: put the selection.json"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not (tmp_path / "selection.json").exists()


def test_resuming_with_overwrite_is_refused(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, peftx.DonodCallback(keep=0.25), **settings).train()
    before = (tmp_path / "selection.json").read_bytes()
    resumed = trainer(tmp_path, peftx.DonodCallback(keep=0.25, overwrite=True), **settings)
    with pytest.raises(ValueError, match="overwrite=True ignores its selection"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (tmp_path / "selection.json").read_bytes() == before


# How the callback finds its trainer


class Own(Trainer):
    """A trainer whose constructor goes on after the Trainer's."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.early = True
        super().__init__(*arguments, **settings)
        self.late = True


@pytest.mark.parametrize("how", ["argument", "class", "subclass", "attach", "prune", "added and attached"])
def test_ways_to_a_pruned_trainer(tmp_path: Path, how: str) -> None:
    callback = peftx.DonodCallback
    if how in ("argument", "class"):
        run = trainer(tmp_path, callback() if how == "argument" else callback)
    elif how == "subclass":
        run = trainer(tmp_path, callback(), cls=Own)
    else:
        run = trainer(tmp_path)
        if how == "prune":
            assert isinstance(prune(run, keep=0.3), callback)
        else:
            one = callback()
            if how == "added and attached":
                run.add_callback(one)
            assert one.attach(run) is one and one.attach(run) is one
            assert run.callback_handler.callbacks.count(one) == 1
    run.train()
    assert len(set(run.watch.seen)) == 12 and run.state.global_step == 6


def test_a_callback_that_comes_too_late_says_so(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.add_callback(peftx.DonodCallback())
    start = parameters(run)
    with pytest.raises(ValueError, match=r"callback.attach\(trainer\), or peftx.pruning.prune\(trainer\)"):
        run.train()
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters(run).items())


def test_one_callback_serves_one_trainer(tmp_path: Path) -> None:
    callback = peftx.DonodCallback()
    trainer(tmp_path, callback)
    with pytest.raises(ValueError, match="a DonodCallback serves one Trainer"):
        callback.attach(trainer(tmp_path))


def test_a_trainer_takes_one_callback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Trainer takes one DonodCallback"):
        trainer(tmp_path, peftx.DonodCallback(), peftx.DonodCallback(keep=0.5))
    run = trainer(tmp_path, peftx.DonodCallback())
    with pytest.raises(ValueError, match="a Trainer takes one DonodCallback"):
        prune(run, keep=0.5)


def test_a_callback_that_is_removed_prunes_no_more(tmp_path: Path) -> None:
    callback = peftx.DonodCallback()
    run = trainer(tmp_path, callback)
    run.remove_callback(callback)
    run.train()
    assert len(set(run.watch.seen)) == COUNT and not (tmp_path / "selection.json").exists()
    callback.attach(run)
    run.watch.seen.clear()
    run.train()
    assert len(set(run.watch.seen)) == 12 and (tmp_path / "selection.json").exists()


def test_a_copy_of_a_trainer_prunes_its_own_data(tmp_path: Path) -> None:
    run = trainer(tmp_path, peftx.DonodCallback(keep=0.25))
    other = copy.deepcopy(run)
    other.train_dataset = examples(20)
    assert len(other.get_train_dataloader().dataset) == 5 and len(run.get_train_dataloader().dataset) == 10


def test_random_needs_neither_warm_up_nor_model(tmp_path: Path) -> None:
    callback = peftx.DonodCallback(method="random")
    run = trainer(tmp_path, callback, kind="bert")
    run.model.register_forward_pre_hook(no_scoring)
    assert len(run.get_train_dataloader().dataset) == 12
    assert callback.selection.key["settings"]["when"] == "start"


def test_samples_that_are_drawn_at_random_disturb_nothing(tmp_path: Path) -> None:
    class Drawn(torch.utils.data.Dataset):
        def __len__(self):
            return COUNT

        def __getitem__(self, place):
            torch.rand(1)
            return examples()[place]

    run = trainer(tmp_path, peftx.DonodCallback(), data=Drawn())
    state = torch.get_rng_state()
    run.get_train_dataloader()
    run.callback_handler.callbacks[-1].on_train_begin(run.args, run.state, run.control)
    assert torch.equal(torch.get_rng_state(), state) and (tmp_path / "selection.md").exists()


def test_what_cannot_be_scored_is_not_warmed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftx.pruning.callback.warmed_up", no_scoring)
    run = trainer(tmp_path, peftx.DonodCallback(), kind="bert")
    run.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="the model is split over processes"):
        run.train()
    with pytest.raises(ValueError, match="ifd compares answers"):
        trainer(tmp_path, peftx.DonodCallback(method="ifd"), kind="bert").train()


def test_a_loader_of_other_data_is_refused(tmp_path: Path) -> None:
    class Stubborn(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(examples(), 4, collate_fn=self.data_collator)

    with pytest.raises(ValueError, match="Stubborn.get_train_dataloader does not load trainer.train_dataset"):
        trainer(tmp_path, peftx.DonodCallback(), cls=Stubborn).train()


@pytest.mark.slow
def test_smaller_batches_after_running_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(Trainer):
        def training_step(self, model, inputs, *arguments, **settings):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *arguments, **settings)

    scored = []
    monkeypatch.setattr("peftx.pruning.callback.score_share", lambda *a, **k: scored.append(1) or score_share(*a, **k))
    callback = peftx.DonodCallback(keep=0.25)
    run = trainer(tmp_path, callback, cls=Large, auto_find_batch_size=True)
    run.train()
    assert len(scored) == 1 and run.state.global_step == run.state.max_steps and run._train_batch_size == 2
    assert set(run.watch.seen) == set(callback.selection.indices)


# Bad input


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(examples())


class Unlike(torch.utils.data.IterableDataset):
    """Other rows on each process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self):
        return iter(examples()[self.rank :])


class Shuffled(Stream):
    def __iter__(self):
        rows = examples()
        return (rows[i] for i in torch.randperm(COUNT).tolist())


class Once(Stream):
    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (Shuffled(), {"max_steps": 3}, "a Shuffled that gives its rows in another order each time cannot be pruned"),
        (Once(), {"max_steps": 3}, "a Once cannot be pruned: it can be read once"),
        (Stream(), {"max_steps": 3, "dataloader_num_workers": 1}, "known by their places.*dataloader_num_workers=1"),
        ([{**row, "labels": torch.full((8,), -100)} for row in examples()], {}, "none of the 40 samples can be kept"),
        ([], {}, "the data set is empty"),
    ],
)
def test_data_that_cannot_be_pruned(tmp_path: Path, data: Any, settings: dict, message: str) -> None:
    run = trainer(tmp_path, peftx.DonodCallback(), data=data, **settings)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert not (tmp_path / "selection.json").exists() and run.train_dataset is data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep must be"),
        ({"keep": 30}, "keep must be"),
        ({"method": "less"}, "unknown method 'less'"),
        ({"don_goal": "paper"}, "don_goal must be"),
        ({"weights": (0, 0)}, "weights must be"),
        ({"when": "later"}, "when must be 'start', 'warmup' or None"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1"),
        ({"eta": -1.0}, "eta must be a positive number"),
        ({"reduction": "max"}, "reduction must be 'mean' or 'sum'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"task": "QA"}, "unknown task 'QA'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peftx.DonodCallback(**settings)


def test_the_happy_path_is_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    transformers.logging.set_verbosity_warning()
    trainer(tmp_path, peftx.DonodCallback()).train()
    assert not [str(warning.message) for warning in recwarn if "peftx" in str(warning.filename)]
    captured = capfd.readouterr()
    assert "scoring" not in captured.err  # disable_tqdm


def test_what_was_kept_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers.logging.set_verbosity_info()
    transformers.logging.enable_propagation()
    logging.getLogger("peftx.pruning.callback").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, peftx.DonodCallback()).train()
    transformers.logging.disable_propagation()
    assert any("Training on 12 of 40 samples; mean scores: {'don'" in record.getMessage() for record in caplog.records)


# TRL


@pytest.mark.trl
@pytest.mark.parametrize("form", ["plain", "packing", "padding_free"])
def test_sft_trainer(tmp_path: Path, form: str) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{name: column.tolist() for name, column in row.items()} for row in examples()]
    callback = peftx.DonodCallback(keep=0.25)
    tokenizer = words()
    settings = {key: value for key, value in arguments(tmp_path).to_dict().items() if key in ARGUMENTS}
    config = trl.SFTConfig(
        str(tmp_path),
        **settings,
        max_length=16 if form == "packing" else None,
        **({} if form == "plain" else {form: True}),
    )
    make = {"args": config, "train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    run = trl.SFTTrainer(tiny_model("llama"), **make, callbacks=[callback])
    run.remove_callback(transformers.PrinterCallback)
    if form == "packing":
        with pytest.raises(ValueError, match="packing=True puts several samples into a row"):
            run.train()
        return
    run.train()
    assert run.state.global_step == 6 and len(callback.selection.indices) == 10
    wanted = score_dataset(tiny_model("llama"), examples())
    torch.testing.assert_close(callback.selection.scores["nod"], wanted["nod"], rtol=1e-2, atol=1e-6)


def trl_trainer(name: str, folder: Path, rows: list[dict], **settings: Any) -> Trainer:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    kept = {key: value for key, value in arguments(folder).to_dict().items() if key in ARGUMENTS}
    config = getattr(trl, f"{name}Config")(str(folder), **kept, **settings)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    extra = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if name == "GRPO" else {}
    data = datasets.Dataset.from_list(rows)
    make = {"args": config, "train_dataset": data, "processing_class": words(), "peft_config": lora, **extra}
    return getattr(trl, f"{name}Trainer")(tiny_model("llama"), **make, callbacks=[peftx.DonodCallback()])


PACKED = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "seq_lengths": [2, 2]}


@pytest.mark.trl
@pytest.mark.parametrize(
    ("name", "row", "settings", "message"),
    [
        ("KTO", {"prompt": "w1", "completion": " w2", "label": True}, {}, "no tensor 'labels'.*prompts and answers"),
        ("GRPO", {"prompt": "w1"}, {"num_generations": 2}, "no tensor 'labels', but a list.*prompts and answers"),
        ("SFT", {"text": "w1 w2 w3"}, {"packing": True, "max_length": 8}, "packing=True puts several samples.*prune"),
        (
            "SFT",
            {"text": "w1 w2 w3"},
            {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
            "packing=True puts several samples into a row",
        ),
        (
            "SFT",
            PACKED,
            {},
            "holds several samples",
        ),
        (
            "SFT",
            PACKED,
            {"padding_free": True, "max_length": None},
            r"holds several samples \(seq_lengths\): score and select before packing",
        ),
    ],
)
def test_what_trl_packs_or_pairs_is_refused(tmp_path: Path, name: str, row: dict, settings: dict, message: str) -> None:
    run = trl_trainer(name, tmp_path, [row] * 12, **settings)
    start = parameters(run)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters(run).items())
    assert not (tmp_path / "selection.json").exists()


ARGUMENTS = {
    *("per_device_train_batch_size", "num_train_epochs", "learning_rate", "save_strategy", "logging_strategy"),
    *("report_to", "disable_tqdm", "use_cpu"),
}


# Two processes


def process(rank: int, folder: Path) -> None:
    join(rank, folder)
    transformers.logging.set_verbosity_error()
    for when in ("start", "warmup"):
        callback = peftx.DonodCallback(keep=0.25, when=when, warmup_steps=3)
        run = trainer(folder / when, callback, data=examples(39), per_device_train_batch_size=2, ddp_backend="gloo")
        model = run.model
        if rank:
            model.lm_head.weight.data.normal_()  # the first process's weights count
        run.train()
        outcome = {
            "indices": callback.selection.indices,
            "scores": callback.selection.scores,
            "steps": run.state.global_step,
            "seen": run.watch.seen,
        }
        torch.save(outcome, folder / f"{when}-{rank}")
    callback = peftx.DonodCallback(keep=0.25)
    run = trainer(
        folder / "stream", callback, data=Stream(), max_steps=3, per_device_train_batch_size=2, ddp_backend="gloo"
    )
    run.train()
    torch.save({"indices": callback.selection.indices, "seen": run.watch.seen}, folder / f"stream-{rank}")
    second = peftx.DonodCallback(keep=0.5, when="warmup", warmup_steps=3)  # of another selection: all refuse
    try:
        trainer(folder / "warmup", second, data=examples(39), ddp_backend="gloo").train()
        message = ""
    except ValueError as error:
        message = str(error)
    bad = [{**row, "labels": row["labels"] + 60 * (i == 4)} for i, row in enumerate(examples(6))]
    try:  # a sample that only one process sees
        trainer(folder / "bad", peftx.DonodCallback(), data=bad, ddp_backend="gloo").train()
        failure = ""
    except (ValueError, RuntimeError) as error:
        failure = str(error)
    try:  # nothing may wait in a collective for a process that failed before it
        callback = peftx.DonodCallback()
        run = trainer(folder / "unlike", callback, data=Unlike(rank), max_steps=3, ddp_backend="gloo")
        run.train()
        unlike = ""
    except (ValueError, RuntimeError) as error:
        unlike = str(error)
    torch.save({"message": message, "failure": failure, "unlike": unlike}, folder / f"errors-{rank}")
    leave()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(process, args=(folder,), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("when", ["start", "warmup"])
def test_two_processes_choose_as_one(two_processes: Path, tmp_path: Path, when: str) -> None:
    first, second = (torch.load(two_processes / f"{when}-{rank}") for rank in range(2))
    torch.testing.assert_close(first["scores"], second["scores"], rtol=0, atol=0)
    assert first["indices"] == second["indices"] and len(first["indices"]) == 10
    assert first["steps"] == 6  # 10 samples in batches of 2 x 2, twice
    one = peftx.DonodCallback(keep=0.25, when=when, warmup_steps=3)
    trainer(tmp_path, one, data=examples(39), per_device_train_batch_size=2).get_train_dataloader()
    torch.testing.assert_close(one.selection.scores, first["scores"], rtol=1e-4, atol=1e-7)
    assert one.selection.indices == first["indices"]
    assert json.loads((two_processes / when / "selection.json").read_text())["indices"] == first["indices"]
    if when == "start":
        assert set(first["seen"]) | set(second["seen"]) == set(first["indices"])


@pytest.mark.slow
def test_two_processes_train_on_a_stream(two_processes: Path, tmp_path: Path) -> None:
    first, second = (torch.load(two_processes / f"stream-{rank}") for rank in range(2))
    one = peftx.DonodCallback(keep=0.25)
    trainer(tmp_path, one).get_train_dataloader()
    assert first["indices"] == second["indices"] == one.selection.indices
    assert set(first["seen"]) | set(second["seen"]) == set(one.selection.indices)


@pytest.mark.slow
def test_both_processes_tell_what_is_wrong(two_processes: Path) -> None:
    first, second = (torch.load(two_processes / f"errors-{rank}") for rank in range(2))
    assert "made for other settings" in first["message"] and first["message"] == second["message"]
    assert "scoring failed on another process" in first["failure"] and "is outside the model's 64" in second["failure"]
    assert "scoring failed on another process" in first["unlike"] and "have different data" in second["unlike"]
