"""`peftx run`: a Python program with the methods registered, in its own process and in those that it starts.

Nothing of the program is imitated: this process becomes `python PROGRAM ARGUMENTS`, before anything heavy is imported,
with one more entry in PYTHONPATH. The `sitecustomize` there registers the methods as soon as PEFT has been imported, or
a compressed model is loaded; a program that does neither loses nothing, and what a program sets in `os.environ` before
its own imports has its effect. Python programs that it starts, workers too, inherit the entry.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import NoReturn

HOOK = Path(__file__).with_name("bootstrap")
RUN = "PEFTX_RUN"  # names the environment (`sys.prefix`) whose programs get the methods
MODULES = ("peftx", "peftx.cli")
FORWARDED = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


class UnknownProgram(ValueError):
    """There is nothing of this name that Python could run."""


def asked(command: list[str]) -> tuple[list[str], list[str]] | None:
    """Options of Python, and the words behind `run`, where a process was started as `peftx run PROGRAM ...`.

    Args:
        command: `sys.orig_argv`.
    """
    words = command[1:]
    while words and words[0].startswith("-"):
        word, *words = words
        taking = next((place for place, letter in enumerate(word) if letter in "cmWX"), 0) if word[1:2] != "-" else 0
        if word[taking] == "c":
            return None
        if word[taking] == "m":
            found = [word[taking + 1 :], *words] if word[taking + 1 :] else words
            options = [*command[1 : len(command) - len(words) - 1], *([word[:taking]] if taking > 1 else [])]
            return (options, found[2:]) if found[0] in MODULES and _is_run(found[1:]) else None
        words = words[1:] if taking == len(word) - 1 or word == "--check-hash-based-pycs" else words
    if words and Path(words[0]).stem == "peftx" and _is_run(words[1:]):
        return command[1 : len(command) - len(words)], words[2:]
    return None


def _is_run(words: list[str]) -> bool:
    """Whether words are `run` and a program; help on it is the command line's."""
    return words[:1] == ["run"] and words[1:2] not in (["-h"], ["--help"])


def arguments(words: list[str]) -> list[str]:
    """What Python is to be given for a program and its arguments.

    A file is run as a script, a name as the console script of this environment or else as a module; a folder or an
    archive with a `__main__.py` comes last, unless its name is a path. `-m` takes a module only.

    Raises:
        UnknownProgram: there is none.
    """
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise UnknownProgram("`peftx run` needs a program: a script, a console script or a module")
    name, *rest = words
    if name == "-m":
        if not rest:
            raise UnknownProgram("-m needs the name of a module")
        if reason := missing(rest[0]):
            raise UnknownProgram(reason)
        return words
    if name.startswith("-"):
        raise UnknownProgram(f"`peftx run` has no option {name}: options of the program stand behind its name")
    path = Path(name)
    if path.is_file():
        if is_foreign(path):
            raise UnknownProgram(f"{name} is no Python program: put `peftx run` before the one that it starts")
        return words
    is_path, is_program = path.name != name, (path / "__main__.py").is_file()
    if not is_path:
        if script := console_script(name):
            return [script, *rest]
        if not (reason := missing(name)):
            return ["-m", *words]
    if is_program:
        return words
    if is_path or path.suffix == ".py":
        raise UnknownProgram(f"there is no file {name}" if not path.exists() else f"{name} has no __main__.py")
    if re.fullmatch(r"(python|pypy)[\d.]*", name):
        raise UnknownProgram(f"`peftx run` starts Python itself: leave {name} out")
    raise UnknownProgram(f"there is no program {name}: no file, no console script of {sys.prefix}, and {reason}")


def console_script(name: str) -> str | None:
    """The file of a Python program that was installed in this environment, for its own interpreter."""
    import sysconfig

    schemes = [sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")]
    places = [str(Path(sys.executable).parent), *(sysconfig.get_path("scripts", scheme) for scheme in schemes)]
    for place in dict.fromkeys(places):
        for ending in ("", ".exe") if os.name == "nt" else ("",):
            file = Path(place, name + ending)
            if file.is_file() and is_python(file):
                return str(file)
    return None


def is_python(file: Path) -> bool:
    """Whether a script's first line names Python, or its second does for the shell, where the first would be too long;
    or it is a launcher of Windows, which carries an archive that Python runs."""
    with file.open("rb") as content:
        first, second = content.readline(1000), content.readline(1000)
    if first.startswith(b"MZ"):
        import zipfile

        return zipfile.is_zipfile(file)
    return first.startswith(b"#!") and (b"python" in first or second.startswith(b"'''exec' "))


def is_foreign(file: Path) -> bool:
    """Whether a file is machine code, or a script for a shell."""
    with file.open("rb") as content:
        head = content.readline(1000)
    return head.startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe")) or (
        re.match(rb"#!.*\b(ba|da|k|z)?sh\s*$", head) is not None and not is_python(file)
    )


def missing(module: str) -> str:
    """Why `python -m` would not find a module, without importing the packages that it is in; empty if it would."""
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    first, *inner = module.split(".")
    if not all(part.isidentifier() for part in (first, *inner)):
        return f"{module!r} is no name of a module"
    try:
        spec = PathFinder.find_spec(first, [str(Path.cwd())]) or find_spec(first)
    except ValueError:
        spec = None
    name = first
    for part in inner:
        name = f"{name}.{part}"
        places = spec.submodule_search_locations if spec is not None else None
        spec = PathFinder.find_spec(name, places) if places is not None else None
    if spec is None:
        return f"no module {module}"
    places = spec.submodule_search_locations
    if places is not None and PathFinder.find_spec(f"{module}.__main__", places) is None:
        return f"the package {module} has no __main__.py"
    return ""


def environment() -> dict[str, str]:
    """That of this process, with the hook in PYTHONPATH.

    Raises:
        UnknownProgram: this Python reads no PYTHONPATH, so that nothing would be registered.
    """
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise UnknownProgram("`peftx run` works through PYTHONPATH, which Python's -I, -E and -S shut out")
    others = os.environ.get("PYTHONPATH", "")
    if others.split(os.pathsep)[0] != str(HOOK):
        others = f"{HOOK}{os.pathsep}{others}" if others else str(HOOK)  # an empty part would be the current folder
    return {**os.environ, "PYTHONPATH": others, RUN: sys.prefix}


def become(options: list[str], words: list[str]) -> NoReturn:
    """Replaces this process by the program; what is no program is told in one line, with exit code 2."""
    try:
        command = [sys.executable, *options, *arguments(words)]
        environ = environment()
    except UnknownProgram as error:
        sys.stderr.write(f"peftx: {error}\n")
        sys.exit(2)
    if os.name == "nt":  # where exec ends this process, and whoever waits for it goes on
        sys.exit(call(command, environ))
    os.execve(sys.executable, command, environ)


def call(command: list[str], environ: dict[str, str]) -> int:
    """Runs a command as a child, which gets the signals that this process gets; its exit code.

    Where a signal ended the child, it ends this process too.
    """
    import subprocess

    child = subprocess.Popen(command, env=environ)
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}  # a terminal sends it to the child as well
    try:
        for number in (getattr(signal, name) for name in FORWARDED if hasattr(signal, name)):
            before[number] = signal.signal(number, lambda number, _: child.send_signal(number))
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code
