"""Output that costs nobody a file.

What a command writes in a folder stands in a list there, `.peftx.json`. Only what this list names, and what has not
changed since, is ever replaced or removed. Everything is written beside its place and renamed. A folder of files is
written as a draft inside the output folder and moved into place when it is whole; a move that was interrupted is
finished by the next command (`recover`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

LIST = ".peftx.json"
DRAFT, READY, NEW = ".peftx-part", ".peftx-ready", ".peftx-new"  # being written; whole, on its way; a run that replaces
EDGE = 1 << 20  # bytes at both ends of a file that go into its hash
DEEP = ("data", "eval_data")  # a folder of data is read with all that lies in it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Entry = dict[str, Any]
Inputs = Mapping[str, Any]


def check_apart(output: str | os.PathLike, inputs: Inputs, what: str = "output") -> None:
    """Compares real places: symbolic links and relative spellings change nothing.

    Args:
        output: what is to be written, a file or a folder.
        inputs: what is read, by name; what is None, or not here (an id of the Hub), is left out.
        what: the output's name in errors.

    Raises:
        ValueError: the output is one of the inputs, or holds one, or lies in a folder of data.
    """
    place = Path(output).resolve()
    for name, source in inputs.items():
        if not isinstance(source, str | os.PathLike) or not str(source) or not Path(source).exists():
            continue
        found = Path(source).resolve()
        shown = name.replace("_", " ")
        if same(place, found):
            raise ValueError(f"{what} {output} is the {shown} itself, which is never changed: name another place")
        if any(same(place, parent) for parent in found.parents):
            raise ValueError(f"{what} {output} holds the {shown} {source}, which is never changed: name another folder")
        if name in DEEP and found.is_dir() and any(same(found, parent) for parent in place.parents):
            raise ValueError(f"{what} {output} lies in the {shown} {source}, all of which is read: name another place")


def same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def facts(path: Path) -> Entry:
    """Size, and SHA-256 of the first and the last MiB: of a large file, whose reading would take long, no more."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(file.read(EDGE))
        if size > 2 * EDGE:
            file.seek(-EDGE, os.SEEK_END)
        digest.update(file.read(EDGE))
    return {"bytes": size, "sha256": digest.hexdigest()}


def entry_of(path: Path, by: str) -> Entry:
    return {"by": by} if path.name == LIST else {"by": by, **facts(path)}


def read_list(folder: Path) -> dict[str, Entry]:
    """What commands of peftx wrote in a folder: `by` whom, and the `facts`; nothing where there is no list.

    A name that ends in `/` is a folder that was being written.

    Raises:
        ValueError: the list is none, or names what is not in its folder.
    """
    path = folder / LIST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["files"]
        for name, entry in found.items():
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or "\\" in name or PurePosixPath(name).is_absolute() or ":" in parts[0]:
                raise ValueError(f"{name!r} is not in the folder")
            if not isinstance(entry["by"], str):
                raise TypeError(f"{name!r} is by {entry['by']!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a list of what peftx wrote ({error}): name another folder, or remove the list, after which "
            "nothing there will be replaced"
        ) from None
    return found


def is_by(folder: Path, by: str) -> bool:
    """Whether `peftx <by>` wrote something in a folder."""
    return any(entry["by"] == by for entry in read_list(folder).values())


def save_list(folder: Path, files: Mapping[str, Entry]) -> None:
    page = json.dumps({"peftx": "what its commands wrote here, and may replace", "files": files}, indent=1)
    with beside(folder / LIST) as draft:
        draft.write_text(page + "\n", encoding="utf-8")


def listed(folder: Path) -> dict[str, Entry]:
    """The entries of a folder's list, and of the lists of folders that it names, by their places under it."""
    found = {}
    for name, entry in read_list(folder).items():
        found[name] = entry
        if PurePosixPath(name).name == LIST:
            inner = PurePosixPath(name).parent
            found |= {f"{inner}/{part}": {**e, "by": entry["by"]} for part, e in listed(folder / inner).items()}
    return found


def note(folder: Path, names: Iterable[str], by: str) -> None:
    """Adds files that are there, and folders (`name/`) that are about to be written, to the list."""
    files = read_list(folder)
    for name in names:
        if name.endswith("/"):
            files[name] = {"by": by}
        elif (folder / name).is_file():
            files[name] = entry_of(folder / name, by)
    save_list(folder, files)


def is_ours(folder: Path, name: str, entry: Entry | None) -> bool:
    """Whether a file is still what the list says. What is reached by a link is not."""
    path = folder / name
    if entry is None or not path.is_file() or any((folder / part).is_symlink() for part in PurePosixPath(name).parents):
        return False
    if path.name == LIST or "bytes" not in entry:  # a list of ours, or a file in a folder that was being written
        return True
    found = facts(path)
    return any({k: known.get(k) for k in found} == found for known in (entry, entry.get("or", {})))


def owner(lists: Mapping[str, Entry], name: str) -> Entry | None:
    """The entry that names a file, or the folder that it was written in."""
    return lists.get(name) or next((lists[f"{p}/"] for p in PurePosixPath(name).parents if f"{p}/" in lists), None)


def check_free(folder: Path, names: Iterable[str], by: str) -> None:
    """Raises ValueError where one of the names is taken by what `peftx <by>` did not write, or has changed since."""
    lists = listed(folder) if folder.is_dir() else {}
    for name in sorted(names):
        path, entry = folder / name, owner(lists, name)
        if (path.exists() or path.is_symlink()) and path.name != LIST:
            if entry is None or entry["by"] != by or path.is_dir():
                raise ValueError(f"{path} is there already, and not by peftx {by}: move it away, or name another place")
            if not is_ours(folder, name, entry):
                raise ValueError(f"{path} has changed since peftx {by} wrote it: move it away, or name another place")
        for parent in path.relative_to(folder).parents[:-1]:
            if (folder / parent).is_symlink() or ((folder / parent).exists() and not (folder / parent).is_dir()):
                raise ValueError(f"{folder / parent} is not a folder to write to: move it away")


def files_in(folder: Path) -> list[str]:
    """All files and links under a folder, links not followed, drafts and the folder's own list left out."""
    found = []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in (DRAFT, READY, NEW) and name not in links]
        found += [(here / name).relative_to(folder).as_posix() for name in (*names, *links)]
    return sorted(name for name in found if name != LIST)


def claim(
    output: str | os.PathLike, by: str, inputs: Inputs, *, overwrite: bool = False, ways: str = "say overwrite"
) -> Path:
    """Checks that a folder may be written to, before the work.

    Args:
        output: the folder, which need not exist.
        by: the command.
        inputs: see `check_apart`.
        overwrite: whether files that the list says are by this command may be replaced. Others stay in any case.
        ways: what the user can say where the folder is not empty.

    Raises:
        ValueError: it is not empty, or a file of this command has changed; see `reached`.
    """
    folder = reached(output, inputs)
    if folder.is_dir() and any(path.name not in (DRAFT, LIST) for path in folder.iterdir()):
        if not overwrite:
            raise ValueError(f"output {folder} is not empty: name another folder, or {ways}")
        lists = listed(folder)
        check_free(folder, [n for n, e in lists.items() if e["by"] == by and not n.endswith("/")], by)
    return folder


def reached(output: str | os.PathLike, inputs: Inputs) -> Path:
    """An output folder as the last command left it: a move that was interrupted is finished.

    Raises:
        ValueError: it is no folder; see `check_apart`.
    """
    folder = Path(output)
    check_apart(folder, inputs)
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise ValueError(f"output {folder} is a file, not a folder")
    recover(folder)
    return folder


@contextmanager
def drafted(output: str | os.PathLike, by: str, *, replace: bool = True) -> Iterator[Path]:
    """A folder to write in; at the end its files are moved to `output`, all of them or, after an error, none.

    Args:
        output: made if missing.
        by: the command; of its files in `output`, those that it has not written anew are removed, if `replace` says so.

    Raises:
        ValueError: a file in the way that is not by this command, or has changed.
        OSError: with what to do, where nothing can be written.
    """
    folder = Path(output)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    draft = folder / DRAFT
    try:
        with writing(folder):
            recover(folder)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            publish(draft, folder, by, replace=replace)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def publish(source: Path, folder: Path, by: str, *, replace: bool = True) -> None:
    """Moves all files of `source`, a folder inside `folder`, to their places there; see `drafted`."""
    names = files_in(source)
    check_free(folder, names, by)
    lists, inner = listed(folder), read_list(source)
    nested = [str(PurePosixPath(name).parent) + "/" for name in names if PurePosixPath(name).name == LIST]
    own = [name for name in names if not name.startswith(tuple(nested))]
    own += [f"{part}{LIST}" for part in nested]
    stay = {n: e for n, e in read_list(folder).items() if e["by"] != by or not replace}
    gone = [n for n, e in lists.items() if replace and e["by"] == by and n not in names]
    entries = {n: entry_of(source / n, by) for n in own}
    entries |= {n: e for n, e in inner.items() if n.endswith("/")}
    plan = {"files": {**stay, **entries}, "gone": gone, "former": {n: lists[n] for n in gone}}
    (source / LIST).write_text(json.dumps(plan), encoding="utf-8")
    source.rename(folder / READY)
    recover(folder)


def recover(folder: Path) -> None:
    """Finishes a move that `publish` began. Nothing is lost where it was interrupted: the rest is still there."""
    ready = folder / READY
    if not ready.is_dir() or not (ready / LIST).is_file():
        return
    plan = json.loads((ready / LIST).read_text(encoding="utf-8"))
    for name in files_in(ready):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (ready / name).replace(folder / name)
    remove(folder, plan["gone"], plan["former"])
    save_list(folder, plan["files"])
    shutil.rmtree(ready)


def remove(folder: Path, names: Iterable[str], lists: Mapping[str, Entry]) -> None:
    """Removes files that are still what the list says, and the folders that they leave empty."""
    for name in names:
        inside = [f"{name}{part}" for part in files_in(folder / name)] if name.endswith("/") else [name]
        for part in inside:
            if is_ours(folder, part, lists.get(name)):
                (folder / part).unlink()
            for parent in (folder / part).relative_to(folder).parents[:-1]:
                with suppress(OSError):
                    (folder / parent).rmdir()


def claim_file(
    path: str | os.PathLike, by: str, inputs: Inputs, *, overwrite: bool = False, what: str = "output"
) -> None:
    """Checks that a file may be written, before the work.

    Raises:
        ValueError: its folder is missing, or it is there already and is not by this command, or has changed since, or
            `overwrite` was not said; see `check_apart`.
    """
    path = Path(path)
    check_apart(path, inputs, what)
    if not path.parent.is_dir():
        raise ValueError(f"{what} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder, not a file")
    check_free(path.parent, [path.name], by)
    if path.exists() and not overwrite:
        raise ValueError(f"{what} {path} is there already: name another file, or say --overwrite")


@contextmanager
def written(path: str | os.PathLike, by: str) -> Iterator[Path]:
    """A place beside a file to write to; at the end it replaces the file, which then stands in the list.

    Raises:
        ValueError: what is there is not by this command, or has changed.
        OSError: with what to do, where nothing can be written.
    """
    path = Path(path)
    folder, name = path.parent, path.name
    with writing(path), beside(path) as draft:
        yield draft
        check_free(folder, [name], by)
        files = read_list(folder)
        new = {"by": by, **facts(draft)}
        both = {**new, "or": files[name]} if name in files else new  # true before and after
        save_list(folder, {**files, name: both})
    with writing(path):
        save_list(folder, {**read_list(folder), name: new})


@contextmanager
def rewritten(path: Path) -> Iterator[Path]:
    """A draft of a file that is edited in place, for whoever it is by; where the list names it, it does so still.

    Raises:
        ValueError: it is a link, which is left to what it leads to.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link to {path.resolve()}: copy the folder, and change the copy")
    with writing(path), beside(path) as draft:
        yield draft
        files = read_list(path.parent)
        if entry := files.get(path.name):
            save_list(path.parent, {**files, path.name: {**facts(draft), "by": entry["by"], "or": entry}})


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A draft of a file, which replaces it in one step at the end, and is removed after an error."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def writing(place: str | os.PathLike, then: str = "start again") -> Iterator[None]:
    """What cannot be written is an OSError that says what to do, also where a library has its own kinds of errors.

    Raises:
        OSError: of the same number, where there is one.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        code = error.errno if isinstance(error, OSError) else None
        if code is None and (told := re.search(r"os error (\d+)|Os \{ code: (\d+)", text)):  # as safetensors tells it
            code = int(told[1] or told[2])
        if code is None and ("writing file" in text or "unexpected pos" in text):  # as torch.save does
            code = errno.ENOSPC
        if code not in FULL:
            raise
        raise OSError(
            code, f"{os.strerror(code)}: free some space and {then}; what was whole before is so still", str(place)
        ) from error
