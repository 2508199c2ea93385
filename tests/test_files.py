"""What a command wrote, and nothing else, is replaced; what was whole stays whole."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftx.files import (
    DRAFT,
    LIST,
    READY,
    check_apart,
    check_free,
    claim,
    claim_file,
    drafted,
    listed,
    note,
    recover,
    rewritten,
    writing,
    written,
)


def pages(folder: Path) -> dict[str, str]:
    """The files under a folder, lists left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LIST
    }


def run(folder: Path, **files: str) -> None:
    with drafted(folder, "train") as draft:
        for name, page in files.items():
            (draft / name.replace("_", "/")).parent.mkdir(exist_ok=True)
            (draft / name.replace("_", "/")).write_text(page)


def test_only_what_the_list_names_is_replaced(tmp_path):
    out = tmp_path / "out"
    run(out, a="1", b="1", sub_c="1")
    (out / "config.json").write_text("mine")
    (out / "sub" / "mine").write_text("mine")
    run(out, a="2")
    assert pages(out) == {"a": "2", "config.json": "mine", "sub/mine": "mine"}
    with pytest.raises(ValueError, match="config.json is there already, and not by peftx train: move it away"):
        run(out, a="3", **{"config.json": "3"})
    (out / "a").write_text("edited")
    for attempt in (lambda: run(out, a="3"), lambda: claim(out, "train", {}, overwrite=True)):
        with pytest.raises(ValueError, match="a has changed since peftx train wrote it"):
            attempt()
    assert pages(out) == {"a": "edited", "config.json": "mine", "sub/mine": "mine"}


def test_an_edit_of_our_own_stays_replaceable(tmp_path):
    run(tmp_path / "out", card="1")
    with rewritten(tmp_path / "out" / "card") as draft:
        draft.write_text("finished")
    claim(tmp_path / "out", "train", {}, overwrite=True)
    run(tmp_path / "out", card="2")
    assert pages(tmp_path / "out") == {"card": "2"}


def test_a_failure_leaves_no_trace(tmp_path):
    with pytest.raises(RuntimeError, match="broken"), drafted(tmp_path / "new" / "out", "train") as draft:
        (draft / "a").write_text("1")
        raise RuntimeError("broken")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["export", "compare"])
def test_the_files_of_another_command_are_not_replaced(tmp_path, other):
    run(tmp_path, a="1")
    with (
        pytest.raises(ValueError, match=f"a is there already, and not by peftx {other}"),
        drafted(tmp_path, other) as draft,
    ):
        (draft / "a").write_text("2")
    assert pages(tmp_path) == {"a": "1"}


def test_the_output_is_not_what_is_read(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "sets" / "data").mkdir(parents=True)
    (tmp_path / "lines.jsonl").write_text("{}")
    os.link(tmp_path / "lines.jsonl", tmp_path / "again.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "up").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "sets")
    inputs = {"model": tmp_path / "model", "data": tmp_path / "sets" / "data", "eval_data": tmp_path / "lines.jsonl"}
    for output, message in {
        "../model": "is the model itself",
        tmp_path / "link": "is the model itself",
        tmp_path / "up" / "model" / "x" / "..": "is the model itself",
        "..": "holds the model",
        tmp_path / "up": "holds the model",
        ".": "holds the data",
        "data": "is the data itself",
        "data/out": "lies in the data",
        tmp_path / "again.jsonl": "is the eval data itself",
        tmp_path / "up" / "lines.jsonl": "is the eval data itself",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_apart(output, inputs)
    check_apart(tmp_path / "model" / "out", inputs)
    check_apart(tmp_path / "new", {"model": "owner/name", "data": None})


@pytest.mark.parametrize(
    "page",
    ["", "[1]", "{", '{"files": []}', '{"files": {"../x": {"by": "train"}}}', '{"files": {"/x": {"by": "train"}}}',
     '{"files": {"a": 3}}', '{"files": {"a/../../x": {"by": "train"}}}', "[" * 100_000],
)  # fmt: skip
def test_a_strange_list_is_refused(tmp_path, page):
    (tmp_path / "out").mkdir()
    (tmp_path / "x").write_text("mine")
    (tmp_path / "out" / "a").write_text("mine")
    (tmp_path / "out" / LIST).write_text(page)
    for attempt in (lambda: claim(tmp_path / "out", "train", {}, overwrite=True), lambda: run(tmp_path / "out", a="2")):
        with pytest.raises(ValueError, match="is not a list of what peftx wrote"):
            attempt()
    assert pages(tmp_path) == {"out/a": "mine", "x": "mine"}


def test_nothing_is_reached_by_a_link(tmp_path):
    run(tmp_path / "out", sub_a="1", b="1")
    (tmp_path / "out" / "sub").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="sub/a has changed|sub is not a folder"):
        claim(tmp_path / "out", "train", {}, overwrite=True)
    run(tmp_path / "out", b="2")
    assert pages(tmp_path / "elsewhere") == {"a": "1"}
    (tmp_path / "out" / "b").unlink()
    (tmp_path / "out" / "b").symlink_to(tmp_path / "elsewhere" / "a")
    with pytest.raises(ValueError, match="b has changed"):
        run(tmp_path / "out", b="3")
    assert pages(tmp_path / "elsewhere") == {"a": "1"}


def test_single_files(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text("mine")
    with pytest.raises(ValueError, match="is there already, and not by peftx prune"):
        claim_file(path, "prune", {}, overwrite=True, what="--out")
    path.unlink()
    for page in ("1", "2"):
        claim_file(path, "prune", {}, overwrite=page == "2", what="--out")
        with written(path, "prune") as draft:
            draft.write_text(page)
    with pytest.raises(ValueError, match="--out .*kept.jsonl is there already: name another file, or say --overwrite"):
        claim_file(path, "prune", {}, what="--out")
    with pytest.raises(ValueError, match="there is no folder"):
        claim_file(tmp_path / "no" / "x", "prune", {})
    with pytest.raises(ValueError, match="is a folder, not a file|not by peftx"):
        claim_file(tmp_path, "prune", {})
    assert pages(tmp_path) == {"kept.jsonl": "2"}


def killed(point: int, work: Callable[[], None]) -> bool:
    """Whether `work`, in a process of its own, was killed before the n-th time that it renames, removes or makes."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    count = iter(range(point + 1))

    def counted(function):
        def call(*args, **kwargs):
            if next(count, None) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    try:
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
            setattr(Path, name, counted(getattr(Path, name)))
        Path.write_text = counted(Path.write_text)
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize("point", range(40))
def test_a_kill_leaves_the_old_or_the_new(tmp_path, point):
    """What a move left undone, the next command finishes."""
    out = tmp_path / "out"
    run(out, a="1", b="1", only1="1")
    was_killed = killed(point, lambda: run(out, a="2", b="2", only2="2"))
    assert was_killed or point > 10  # the points are some that it passes
    old, new = {"a": "1", "b": "1", "only1": "1"}, {"a": "2", "b": "2", "only2": "2"}
    if not (out / READY).is_dir():
        assert {k: v for k, v in pages(out).items() if not k.startswith(DRAFT)} in (old, new)
    claim(out, "train", {}, overwrite=True)
    found = {k: v for k, v in pages(out).items() if not k.startswith((DRAFT, "..peftx"))}
    assert found in (old, new)
    assert set(listed(out)) == set(found)
    run(out, a="3")
    assert {k: v for k, v in pages(out).items() if ".part" not in k} == {"a": "3"}


@pytest.mark.parametrize("what", ["page", "tensors", "pickle"])
def test_a_full_disk_is_told_and_loses_nothing(tmp_path, what):
    run(tmp_path / "out", a="1")
    with written(tmp_path / "x", "prune") as draft:
        draft.write_text("1")

    def write(path: Path) -> None:
        if what == "page":
            path.write_text("2" * 100_000)
        elif what == "tensors":
            save_file({"a": torch.zeros(100_000)}, path)
        else:
            torch.save({"a": torch.zeros(100_000)}, path)

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        told = "free some space and start again; what was whole before is so still"
        with pytest.raises(OSError, match=told), drafted(tmp_path / "out", "train") as draft:
            write(draft / "a")
        with pytest.raises(OSError, match="free some space"), written(tmp_path / "x", "prune") as draft:
            write(draft)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert pages(tmp_path) == {"out/a": "1", "x": "1"}


def test_no_space_left_keeps_its_number(tmp_path):
    told = "No space left on device: free some space and go on by resume"
    with pytest.raises(OSError, match=told) as caught, writing(tmp_path, "go on by resume"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="another"), writing(tmp_path):
        raise RuntimeError("another")


def test_a_large_file_is_known_by_its_ends(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(b"a" * (5 << 20))
    note(tmp_path, ["big"], "train")
    check_free(tmp_path, ["big"], "train")
    for place in (0, (5 << 20) - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"b")
        with pytest.raises(ValueError, match="has changed"):
            check_free(tmp_path, ["big"], "train")
        path.write_bytes(b"a" * (5 << 20))


def test_a_list_in_a_folder_that_is_not_named_is_another_runs(tmp_path):
    """A run in a folder of runs does not remove its neighbours."""
    run(tmp_path, a="1")
    run(tmp_path / "neighbour", b="1")
    run(tmp_path, c="2")
    assert pages(tmp_path) == {"c": "2", "neighbour/b": "1"}


def test_recovering_twice_changes_nothing(tmp_path):
    run(tmp_path, a="1")
    before = json.loads((tmp_path / LIST).read_text())
    recover(tmp_path)
    assert json.loads((tmp_path / LIST).read_text()) == before and set(before["files"]) == {"a"}
