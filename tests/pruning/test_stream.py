"""Streams, scores in parts that survive a kill, and shares of processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from processes import join, leave
from test_pruning import assert_scores, classes, pad_rows, pad_sequences, rows, small
from test_pruning_callback import COUNT, arguments, examples, parameters, trainer

import peftx
from peftx.pruning import METRICS, Selection, score_dataset, select, subset
from peftx.pruning.parts import MANIFEST, Parts, remove_parts
from peftx.pruning.rows import Stream

datasets = pytest.importorskip("datasets")
pytest.importorskip("pyarrow")


def stream(samples: list[dict]) -> Any:
    return datasets.IterableDataset.from_generator(lambda: iter(samples))


class Torch(torch.utils.data.IterableDataset):
    """A stream with nothing but its rows."""

    def __init__(self, samples: list[dict]) -> None:
        self.samples, self.read = samples, 0

    def __iter__(self):
        for sample in self.samples:
            self.read += 1
            yield dict(sample)


class Long(Torch):
    """Torch lets a stream say how long it is, and gives it a `__getitem__` that raises."""

    def __len__(self) -> int:
        return len(self.samples)


@pytest.mark.parametrize("make", [stream, Torch, Long])
@pytest.mark.parametrize("parts", [False, True])
def test_a_stream_has_the_scores_of_its_rows(tmp_path: Path, make: Any, parts: bool) -> None:
    model, folder = small("llama").double(), tmp_path / "scores" if parts else None
    wanted = score_dataset(model, rows(21), pad_rows, metrics=METRICS, batch_size=4)
    found = score_dataset(model, make(rows(21)), pad_rows, metrics=METRICS, batch_size=4, folder=folder, part_rows=8)
    assert list(found) == list(wanted)
    assert_scores(found, wanted, rtol=1e-9)
    kept = select(found, 0.3)
    assert [row["input_ids"] for row in subset(make(rows(21)), kept)] == [rows(21)[i]["input_ids"] for i in kept]


def test_one_batch_of_a_stream_is_held() -> None:
    data = Torch(rows(50))
    source = Stream(data)
    for start in range(0, 50, 7):
        assert len(source.read(start, start + 7)) == min(7, 50 - start)
        assert len(source.ahead) <= 7 and data.read <= start + 7
    assert source.read(49, 60) == rows(50)[49:] and not source.has(50) and source.reach(70) == 50


def test_subset_of_everything_else() -> None:
    data = datasets.Dataset.from_list(rows(10))
    assert [row["input_ids"] for row in subset(data, [1, 4])] == [rows(10)[i]["input_ids"] for i in (1, 4)]
    assert list(subset(rows(10), [1, 4])) == [rows(10)[1], rows(10)[4]]
    short = subset(Torch(rows(10)), [1, 12])
    with pytest.raises(ValueError, match="the stream ended before its row 12, which was chosen"):
        list(short)
    loader = torch.utils.data.DataLoader(subset(Torch(rows(10)), [1, 4]), batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match="dataloader_num_workers=0"):
        list(loader)


def test_an_empty_stream() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        score_dataset(small("llama"), stream([]), pad_rows)


# Parts


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """30 rows in parts of 8, and their scores."""
    folder = tmp_path / "scores"
    return folder, score_dataset(small("llama"), rows(30), pad_rows, folder=folder, part_rows=8, batch_size=4)


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows go through the model from now on."""
    from peftx.pruning.scorer import Scorer

    seen: list[int] = []
    call = Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda self, batch, size: seen.append(size) or call(self, batch, size))
    return seen


@pytest.mark.parametrize("make", [list, stream])
@pytest.mark.parametrize("lost", [[], [0], [1, 2], [3], [0, 1, 2, 3]])
def test_only_what_is_missing_is_scored_again(
    tmp_path: Path, make: Any, lost: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "scores", small("llama")
    metrics = ("don", "nod", "random")
    settings: dict[str, Any] = {"folder": folder, "batch_size": 4, "metrics": metrics}
    whole = score_dataset(model, make(rows(30)), pad_rows, **settings, part_rows=8)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [*(f"part-{i:06d}.parquet" for i in range(4)), MANIFEST]
    for number in lost:
        (folder / names[number]).rename(folder / f".{names[number]}.part")  # as a kill leaves it
    seen = count_rows(monkeypatch)
    again = score_dataset(model, make(rows(30)), pad_rows, **settings)  # the folder says how long its parts are
    assert sum(seen) == sum(6 if number == 3 else 8 for number in lost)
    for name, column in whole.items():
        assert torch.equal(column, again[name]), name
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == names


@pytest.mark.parametrize("count", [8, 16])
def test_full_last_parts(tmp_path: Path, count: int) -> None:
    for make in (list, stream):
        folder = tmp_path / make.__name__
        found = score_dataset(small("llama"), make(rows(count)), pad_rows, folder=folder, part_rows=8)
        assert len(found["don"]) == count and len(list(folder.glob("*.parquet"))) == count // 8


def test_classes_and_samples_without_scores_survive_parts(tmp_path: Path) -> None:
    samples = classes(20)
    samples[3]["label"] = -100
    plain = score_dataset(small("bert"), samples, pad_sequences, batch_size=4)
    for _ in range(2):
        found = score_dataset(small("bert"), samples, pad_sequences, batch_size=4, folder=tmp_path / "s", part_rows=8)
        assert_scores(found, plain, rtol=1e-9)
        assert found["don"][3].isnan() and found["label"][3] == -100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": rows(31)}, r"has scores of other data \(data .*30.*now .*31"),
        ({"dataset": [*rows(29), rows(1)[0]]}, "has scores of other data"),
        ({"model": None}, "has scores of other model"),
        ({"eta": 0.1}, r"has scores of other settings \(settings .*0.001.*now .*0.1"),
        ({"metrics": ["loss"]}, "has scores of other settings"),
        ({"reduction": "sum"}, "has scores of other settings"),
        ({"indices": list(range(30))}, "has scores of other indices"),
        ({"dataset": "stream"}, "has scores of other data"),
    ],
)
def test_parts_of_something_else_are_refused(scored: Any, change: dict, message: str) -> None:
    folder, _ = scored
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = {"model": small("llama"), "dataset": rows(30), "collator": pad_rows, **change}
    if arguments["model"] is None:
        arguments["model"] = small("llama")
        arguments["model"].lm_head.weight.data[0] += 1e-3
    if arguments["dataset"] == "stream":
        arguments["dataset"] = stream(rows(30))
    with pytest.raises(ValueError, match=f"{message}.*Give another folder, or delete this one"):
        score_dataset(**arguments, folder=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_rows_that_changed_behind_the_fingerprint_are_seen(scored: Any) -> None:
    """The first row of each part is compared, also where the fingerprint looks at the start of a stream only."""
    folder, _ = scored
    other = folder.with_name("other")
    score_dataset(small("llama"), Torch(rows(30)), pad_rows, folder=other, part_rows=8)
    manifest = json.loads((other / MANIFEST).read_text())
    data = Torch([*rows(16), rows(1, seed=5)[0], *rows(30)[17:]])
    manifest["key"]["data"] = peftx.pruning.fingerprint(data)  # as if they began alike
    (other / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="part-000000.parquet does not belong to these scores"):
        score_dataset(small("llama"), data, pad_rows, folder=other)


def foreign(folder: Path, number: int = 1) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"x": [1.0]}), folder / f"part-{number:06d}.parquet")


def swapped(folder: Path) -> None:
    first, second = folder / "part-000000.parquet", folder / "part-000001.parquet"
    second.write_bytes(first.read_bytes())


def rewritten(folder: Path, change: Any) -> None:
    """The same owner, other columns."""
    import pyarrow.parquet

    path = folder / "part-000001.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "part-000001.parquet").write_bytes(b""),
        lambda folder: (folder / "part-000001.parquet").write_bytes(b"PAR1 nonsense PAR1"),
        lambda folder: (folder / "part-000001.parquet").write_bytes(
            (folder / "part-000001.parquet").read_bytes()[:-40]
        ),
        lambda folder: ((folder / "part-000001.parquet").unlink(), (folder / "part-000001.parquet").mkdir()),
        foreign,
        swapped,
        lambda folder: rewritten(folder, lambda table: table.slice(0, 5)),
        lambda folder: rewritten(folder, lambda table: table.drop_columns(["don"])),
        lambda folder: rewritten(folder, lambda table: table.set_column(0, "index", [[0] * 8])),
        lambda folder: rewritten(folder, lambda table: table.set_column(1, "don", [["a"] * 8])),
        lambda folder: rewritten(folder, lambda table: table.set_column(1, "don", [[None, *[1.0] * 7]])),
    ],
)
def test_damaged_parts_are_refused(scored: Any, damage: Any) -> None:
    folder, _ = scored
    damage(folder)
    with pytest.raises(ValueError, match=r"part-000001.parquet does not belong to these scores, or is damaged"):
        score_dataset(small("llama"), rows(30), pad_rows, folder=folder)


@pytest.mark.parametrize(
    "page", ["", "{", "[]", "{}", '{"format": 2, "rows": 8, "key": {}}', '{"format": 1, "rows": true, "key": {}}']
)
def test_damaged_manifests_are_refused(scored: Any, page: str) -> None:
    folder, _ = scored
    (folder / MANIFEST).write_text(page)
    with pytest.raises(ValueError, match="scores.json says not what its scores are of"):
        score_dataset(small("llama"), rows(30), pad_rows, folder=folder)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files, and no scores.json"):
        score_dataset(small("llama"), rows(30), pad_rows, folder=tmp_path)
    with pytest.raises(ValueError, match="is a file, not a folder"):
        score_dataset(small("llama"), rows(30), pad_rows, folder=tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    for wrong in (5, True, b"x"):
        with pytest.raises(ValueError, match="folder must be a path"):
            score_dataset(small("llama"), rows(30), pad_rows, folder=wrong)


def test_a_failing_write_leaves_no_part(scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = scored
    (folder / "part-000002.parquet").unlink()

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            score_dataset(small("llama"), rows(30), pad_rows, folder=folder)
    assert sorted(path.name for path in folder.glob("*part-*")) == [f"part-{i:06d}.parquet" for i in (0, 1, 3)]


def test_removing_takes_what_was_written_and_no_more(scored: Any) -> None:
    folder, _ = scored
    (folder / "notes.txt").write_text("mine")
    remove_parts(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


SCORING = """
import sys, time
sys.path[:0] = [{tests!r}, {room!r}]
from test_pruning import pad_rows, rows, small
from peftx.pruning import score_dataset
slow = lambda batch: (time.sleep(0.02), pad_rows(batch))[1]
score_dataset(small("llama"), rows(400), slow, folder={folder!r}, part_rows=16, batch_size=4, progress=False)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, room = tmp_path / "scores", Path(__file__).parent
    code = SCORING.format(tests=str(room.parent), room=str(room), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while len(list(folder.glob("part-*"))) < 5 and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(folder.glob("part-*")))
    assert 5 <= there < 25
    seen = count_rows(monkeypatch)
    found = score_dataset(small("llama"), rows(400), pad_rows, folder=folder, batch_size=4)
    assert sum(seen) == 400 - 16 * there
    plain = score_dataset(small("llama"), rows(400), pad_rows, batch_size=4)
    assert_scores(found, plain, rtol=1e-6)


# The callback


def test_a_trainer_on_a_stream(tmp_path: Path) -> None:
    """Trains on the rows that the same choice from a list keeps, in their order."""
    plain = [{name: part.tolist() for name, part in row.items()} for row in examples()]
    callback = peftx.DonodCallback(keep=0.25)
    run = trainer(tmp_path, callback, data=stream(plain), max_steps=6)
    run.train()
    wanted = select(score_dataset(run.model.__class__(run.model.config), plain), 0.25)
    assert len(wanted) == 10
    by_list = peftx.DonodCallback(keep=0.25)
    other = trainer(tmp_path / "list", by_list, data=plain)
    other.train()
    assert callback.selection.indices == by_list.selection.indices
    assert run.watch.seen[:10] == [plain[i]["input_ids"][0] - 1 for i in by_list.selection.indices]
    assert run.state.global_step == 6 and callback.selection.key["data"]["samples"] == COUNT
    assert (tmp_path / "selection.json").is_file()
    assert not (tmp_path / "selection-scores").exists()
    assert "10 of 40 samples kept by donod" in (tmp_path / "selection.md").read_text()


def test_a_stream_is_told_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [{name: part.tolist() for name, part in row.items()} for row in examples()]
    trainer(tmp_path, peftx.DonodCallback(), data=stream(plain), max_steps=2).train()
    monkeypatch.setattr("peftx.pruning.callback.score_share", lambda *_, **__: pytest.fail("scored again"))
    again = peftx.DonodCallback()
    trainer(tmp_path, again, data=stream(plain), max_steps=2).train()
    assert again.selection.key["data"]["samples"] == COUNT
    with pytest.raises(ValueError, match="was made for other data"):
        trainer(tmp_path, peftx.DonodCallback(), data=stream(plain[::-1]), max_steps=2).train()


def test_a_warm_up_on_a_stream_is_told_how_long(tmp_path: Path) -> None:
    data = stream([{"input_ids": row["input_ids"], "labels": row["label"]} for row in classes(20)])
    with pytest.raises(ValueError, match="warmup_steps="):
        trainer(tmp_path, peftx.DonodCallback(), kind="bert", data=data, max_steps=2).train()
    run = trainer(tmp_path, peftx.DonodCallback(warmup_steps=2, keep=0.5), kind="bert", data=data, max_steps=2)
    run.data_collator = pad_rows_and_labels
    start = parameters(run)
    run.get_train_dataloader()
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters(run).items())


def pad_rows_and_labels(samples: list[dict]) -> dict:
    batch = pad_sequences([{"input_ids": sample["input_ids"]} for sample in samples])
    return {**batch, "labels": torch.tensor([sample["labels"] for sample in samples])}


@pytest.mark.parametrize("make", [list, stream])
def test_the_callback_goes_on_within_the_scoring(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftx.pruning.callback.PART_ROWS", 8)
    plain = [{name: part.tolist() for name, part in row.items()} for row in examples()]

    def run(**settings: Any) -> Any:
        return trainer(tmp_path / "run", peftx.DonodCallback(keep=0.25, **settings), data=make(plain), max_steps=3)

    seen = count_rows(monkeypatch)
    broken = run()

    def collator(samples: list) -> dict:
        if any(sample["input_ids"][0] == 26 for sample in samples):  # the 26th, in the fourth part
            raise KeyboardInterrupt
        return transformers.default_data_collator(samples)

    broken.data_collator = collator
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    folder = tmp_path / "run" / "selection-scores"
    done = len(list(folder.glob("part-*.parquet")))
    assert done == 3
    different = run(eta=0.1)
    with pytest.raises(ValueError, match="has scores of other settings.*a scoring that was interrupted left it"):
        different.train()
    seen.clear()
    goes_on = run(overwrite=True)
    goes_on.train()
    assert sum(seen) == COUNT - 8 * done
    callback = goes_on.callback_handler.callbacks[-1]
    unbroken = peftx.DonodCallback(keep=0.25)
    trainer(tmp_path / "other", unbroken, data=plain).train()
    assert callback.selection.indices == unbroken.selection.indices
    assert not folder.exists() and (tmp_path / "run" / "selection.json").exists()


def test_samples_of_chance_are_scored_without_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would not be known again."""
    monkeypatch.setattr("peftx.pruning.callback.PART_ROWS", 8)

    class Drawn(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, place: int) -> dict:
            row = examples()[place]
            return {**row, "input_ids": row["input_ids"].where(torch.rand(8) < 0.8, 5)}

    trainer(tmp_path, peftx.DonodCallback(report=False), data=Drawn()).get_train_dataloader()
    assert not list(tmp_path.iterdir())


def test_overwrite_starts_anew_where_the_parts_are_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftx.pruning.callback.PART_ROWS", 8)
    Parts(tmp_path / "selection-scores", {"data": "other"}, ["don"]).write(0, [0], torch.zeros(1, 1), 0)
    callback = peftx.DonodCallback(overwrite=True)
    trainer(tmp_path, callback).train()
    assert len(callback.selection.indices) == 12 and not (tmp_path / "selection-scores").exists()


# Selections of many samples


def test_many_scores_go_into_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftx.pruning.selection.IN_JSON", 20)
    callback = peftx.DonodCallback(keep=0.25)
    trainer(tmp_path, callback).train()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"selection.json", "selection-scores.parquet"} <= names
    assert json.loads((tmp_path / "selection.json").read_text())["scores"] is None
    found = Selection.load(tmp_path / "selection.json")
    assert found.indices == callback.selection.indices
    torch.testing.assert_close(found.scores, callback.selection.scores, rtol=0, atol=0, equal_nan=True)
    again = peftx.DonodCallback(keep=0.25)
    trainer(tmp_path, again).train()
    assert again.selection.indices == found.indices

    columns = tmp_path / "selection-scores.parquet"
    whole = columns.read_bytes()
    for damage in (b"", b"PAR1", whole[:-9]):
        columns.write_bytes(damage)
        with pytest.raises(ValueError, match=r"selection.json is not a selection of peftx \(selection-scores.parquet"):
            Selection.load(tmp_path / "selection.json")
    columns.unlink()
    with pytest.raises(ValueError, match="is not a selection of peftx"):
        Selection.load(tmp_path / "selection.json")


def test_a_parquet_file_of_the_user_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftx.pruning.selection.IN_JSON", 2)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "mine-scores.parquet")
    before = (tmp_path / "mine-scores.parquet").read_bytes()
    selection = Selection([0], {"don": torch.ones(3).double()}, {"data": {"samples": 3}})
    with pytest.raises(ValueError, match="mine-scores.parquet is not a file of scores"):
        selection.save(tmp_path / "mine.json")
    assert (tmp_path / "mine-scores.parquet").read_bytes() == before and not (tmp_path / "mine.json").exists()


# Two processes


def process(rank: int, folder: Path) -> None:
    join(rank, folder)
    model, seen = small("llama"), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    settings: dict[str, Any] = {"shard": True, "batch_size": 4, "progress": False, "metrics": ("don", "random")}
    found = {}
    for name, data in {"list": rows(30), "stream": Torch(rows(30))}.items():
        for parts in (None, folder / name):
            seen.clear()
            scores = score_dataset(model, data, pad_rows, **settings, folder=parts, part_rows=8)
            found[f"{name} {parts is not None}"] = (scores, sum(seen))
    if rank == 0:
        (folder / "list" / "part-000001.parquet").unlink()
        (folder / "list" / "part-000002.parquet").unlink()
    dist.barrier()
    seen.clear()
    found["again"] = (score_dataset(model, rows(30), pad_rows, **settings, folder=folder / "list"), sum(seen))
    errors = []
    for count in (30 + rank, 30):
        data = rows(count)
        if count == 30 and rank == 1:
            data[4]["labels"] = [64] * len(data[4]["labels"])
        try:
            score_dataset(model, Torch(data), pad_rows, **settings)
            errors.append("")
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
    torch.save((found, errors), folder / f"{rank}.pt")
    leave()


@pytest.mark.slow
def test_two_processes_share_the_samples(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(tmp_path,), nprocs=2)
    (first, errors), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    wanted = score_dataset(small("llama"), rows(30), pad_rows, metrics=("don", "random"), batch_size=4)
    for name in first:
        torch.testing.assert_close(first[name][0], second[name][0], rtol=0, atol=0)
        assert_scores(first[name][0], wanted, rtol=1e-6)
        total = first[name][1] + second[name][1]
        assert total == (16 if name == "again" else 30) and min(first[name][1], second[name][1]) >= 8
    assert "the processes read different numbers of samples" in errors[0] and errors[0] == others[0]
    assert "scoring failed on another process" in errors[1] and "label 64 is outside" in others[1]


def test_a_share_of_one_process_is_everything() -> None:
    assert len(score_dataset(small("llama"), rows(10), pad_rows, shard=True)["don"]) == 10


def test_arguments_of_a_trainer_are_not_needed(tmp_path: Path) -> None:
    """A loader of the stream that accelerate has prepared, without a callback."""
    plain = [{name: part.tolist() for name, part in row.items()} for row in examples()]
    kept = subset(stream(plain), [3, 5])
    run = transformers.Trainer(small("llama"), arguments(tmp_path, max_steps=2), train_dataset=kept)
    run.train()
    assert run.state.global_step == 2
