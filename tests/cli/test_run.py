"""`peftx run`: what a program sees is what Python shows it, and the methods are there when it wants them."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import CASES, adapted, logits, tiny_model
from safetensors.torch import save_file
from typer.testing import CliRunner

import peftx
from peftx import launch
from peftx.cards.compressed import QUANT_METHOD
from peftx.cli import app

RUN = [sys.executable, "-m", "peftx", "run"]
SEEN = """
import json, os, sys
spec = __spec__ and (__spec__.name, __spec__.origin)
main = sys.modules["__main__"].__dict__ is globals()
builtin = [name for name in ("peft", "torch", "transformers", "typer", "peftx") if name in sys.modules]
seen = [__name__, __file__, __package__, spec, main, builtin, sys.argv, sys.path, sys.flags.optimize]
print(json.dumps(seen))
sys.stderr.write("to stderr")
sys.exit(int(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].isdigit() else None)
"""
WORDS = ["7", "--help", "-m", "--to", "x", "--", "-h", ""]


def done(*words, **options):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One program as script, folder, archive, module, package and module of a package."""
    place = tmp_path_factory.mktemp("programs")
    folders = [f"{name}/__main__.py" for name in ("package", "folder", "my-tool")]
    for name in ("script.py", "no_ending", "module.py", "package/part.py", *folders):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(SEEN)
    (place / "package" / "__init__.py").write_text("")
    (place / "bare").mkdir()
    (place / "bare" / "__init__.py").write_text("")
    (place / "broken.py").write_text("def f():\n    raise KeyError('lost')\nf()\n")
    (place / "train.sh").write_text("#!/usr/bin/env bash\npython script.py\n")
    with zipfile.ZipFile(place / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", SEEN)
    return place


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        (["script.py"], ["script.py"]),
        (["./no_ending"], ["./no_ending"]),
        (["no_ending"], ["no_ending"]),
        (["--", "script.py"], ["script.py"]),
        (["folder/"], ["folder/"]),
        (["folder"], ["-m", "folder"]),
        (["my-tool"], ["my-tool"]),
        (["archive.zip"], ["archive.zip"]),
        (["-m", "module"], ["-m", "module"]),
        (["module"], ["-m", "module"]),
        (["package"], ["-m", "package"]),
        (["package.part"], ["-m", "package.part"]),
        (["-m", "package.part"], ["-m", "package.part"]),
    ],
)
def test_a_program_sees_what_python_shows_it(place, words, plain):
    found, wanted = (done(*command, *WORDS, cwd=place) for command in ([*RUN, *words], [sys.executable, *plain]))
    assert wanted.returncode == 7 and json.loads(wanted.stdout)[6][1:] == WORDS
    assert (found.returncode, found.stdout, found.stderr) == (7, wanted.stdout, wanted.stderr)


def test_options_of_python_stay(place):
    for flags in (["-O"], ["-OO", "-X", "utf8", "-W", "error"]):
        command = [sys.executable, *flags, *RUN[1:], "script.py"]
        wanted = done(sys.executable, *flags, "script.py", cwd=place)
        assert done(*command, cwd=place).stdout == wanted.stdout and json.loads(wanted.stdout)[-1] == len(flags[0]) - 1


def test_an_error_is_told_as_python_tells_it(place):
    found, wanted = (done(*command, "broken.py", cwd=place) for command in (RUN, [sys.executable]))
    assert (found.returncode, found.stderr) == (1, wanted.stderr) and "KeyError: 'lost'" in wanted.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("way", ["become", "call"])
def test_signals_reach_the_program_and_end_it(place, way, tmp_path):
    program = tmp_path / "waits.py"
    program.write_text(
        "import signal, sys, time\n"
        "if sys.argv[1] == 'handled': signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background job ignores
        "print('ready', flush=True)\nwhile True: time.sleep(0.05)\n"
    )
    here = f"import importlib.util as u, sys\ns = u.spec_from_file_location('launch', {launch.__file__!r})\n"
    here += "m = u.module_from_spec(s)\ns.loader.exec_module(m)\n"
    here += "sys.exit(m.call([sys.executable, *m.arguments(sys.argv[1:])], m.environment()))"
    command = RUN if way == "become" else [sys.executable, "-c", here]
    for number, word, code in (
        (signal.SIGTERM, "handled", 5),
        (signal.SIGTERM, "not", -signal.SIGTERM),
        *([(signal.SIGINT, "not", -signal.SIGINT)] if way == "become" else []),
    ):
        with subprocess.Popen([*command, program, word], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(number)
            assert process.wait(60) == code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing-such"], "peftx: there is no program nothing-such: no file, no console script of "),
        (["nothing.py"], "peftx: there is no file nothing.py"),
        (["no/such/folder"], "peftx: there is no file no/such/folder"),
        (["./bare"], "peftx: ./bare has no __main__.py"),
        (["bare"], "and the package bare has no __main__.py"),
        (["-m"], "peftx: -m needs the name of a module"),
        (["-m", "package.nothing"], "peftx: no module package.nothing"),
        (["-m", "module.inner"], "peftx: no module module.inner"),
        (["-m", "script.py"], "peftx: no module script.py"),
        (["-m", "a/b"], "peftx: 'a/b' is no name of a module"),
        (
            ["--fast", "script.py"],
            "peftx: `peftx run` has no option --fast: options of the program stand behind",
        ),
        ([], "peftx: `peftx run` needs a program"),
        (["python", "script.py"], "peftx: `peftx run` starts Python itself: leave python out"),
        (["./train.sh"], "peftx: ./train.sh is no Python program: put `peftx run` before the one that it starts"),
        ([sys.executable, "script.py"], "is no Python program"),
    ],
)
def test_an_unknown_program_is_one_line_and_exit_code_2(place, words, message):
    found = done(*RUN, *words, cwd=place)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1) and message in found.stderr


def test_a_python_that_reads_no_pythonpath_is_refused(place):
    root = Path(launch.__file__).parents[1]
    found = done(sys.executable, "-s", "-E", *RUN[1:], place / "script.py", cwd=root)
    assert found.returncode == 2 and "which Python's -I, -E and -S shut out" in found.stderr


def test_help_is_that_of_run_or_of_the_program(place):
    outcome = CliRunner().invoke(app, ["run", "--help"])
    assert outcome.exit_code == 0 and "PROGRAM" in outcome.output and "registered" in outcome.output
    assert json.loads(done(*RUN, "script.py", "--help", cwd=place).stdout)[6] == ["script.py", "--help"]


def test_the_command_in_a_process_that_goes_on(place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    for words in (["script.py", *WORDS], ["-m", "package", *WORDS]):
        assert CliRunner().invoke(app, ["run", *words]).exit_code == 7
        assert json.loads(capfd.readouterr().out)[6][1:] == WORDS
    assert CliRunner().invoke(app, ["run", "nothing-such"]).exit_code == 2


def test_console_scripts_are_those_of_this_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    heads = {"plain": "#!/opt/x/bin/python3\n", "long": '#!/bin/sh\n\'\'\'exec\' "/long/python" "$0" "$@"\n'}
    for name, head in {**heads, "shell": "#!/bin/sh\necho\n", "binary": "\x7fELF"}.items():
        (tmp_path / name).write_text(head)
    for name in ("plain", "long"):
        assert launch.arguments([name, "-x"]) == [str(tmp_path / name), "-x"]
    for name in ("shell", "binary", "absent"):
        with pytest.raises(launch.UnknownProgram, match="no console script"):
            launch.arguments([name])


def test_the_environment_s_own_sitecustomize_runs_and_its_places_stay(place, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.own = 'was here'")
    (tmp_path / "show.py").write_text("import sitecustomize, os; print(own, sitecustomize.__file__)")
    root = str(Path(launch.__file__).parents[1])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    for command in (RUN, [*RUN, *RUN[1:]]):  # also twice
        found = done(*command, tmp_path / "show.py", env=environ)
        assert found.stdout == f"was here {tmp_path / 'sitecustomize.py'}\n", found.stderr


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("python -m peftx run x -m y", ([], ["x", "-m", "y"])),
        ("python -u -X dev -m peftx run x", (["-u", "-X", "dev"], ["x"])),
        ("python -um peftx.cli run x", (["-u"], ["x"])),
        ("python -mpeftx run x", ([], ["x"])),
        ("python -W error /bin/peftx run x --help", (["-W", "error"], ["x", "--help"])),
        ("python peftx run --help", None),
        ("python peftx train run", None),
        ("python -m pytest peftx run x", None),
        ("python x.py peftx run y", None),
        ("python -c peftx run x", None),
        ("python", None),
    ],
)
def test_which_processes_become_a_program(command, wanted):
    assert launch.asked(command.split()) == wanted


HOOKED = "any(type(finder).__name__ == 'Registrar' for finder in __import__('sys').meta_path)"
PROGRAM = f"""
import json, multiprocessing, subprocess, sys

def spawned(queue):
    import peft
    queue.put("BONE" in peft.PeftType.__members__)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    context.Process(target=spawned, args=(queue,)).start()
    from transformers import AutoModelForCausalLM
    root = sys.argv[1]
    late = "peft" not in sys.modules
    small = type(AutoModelForCausalLM.from_pretrained(root + "/small")).__name__ if late else "too early"
    from transformers import Trainer  # which imports PEFT half-way
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root + "/base"), root + "/adapter").eval()
    with torch.no_grad():
        found = model(input_ids=load_file(root + "/tokens.safetensors")["tokens"]).logits
    children = [subprocess.check_output([sys.executable, *f, "-c", "print({HOOKED})"]) for f in ([], ["-I"])]
    print(json.dumps([queue.get(), *map(bytes.decode, children), small, found.tolist()]))
    sys.exit(3)
"""


@pytest.mark.slow
def test_a_program_that_never_imports_peftx_loads_its_adapters(tmp_path, tokens):
    """And so do workers that it spawns and Python programs that it starts, but for those that are shut off (-I)."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    case = next(case for case in CASES if case.name == "bone")
    model = adapted(tiny_model("llama"), case, target_modules="all-linear", task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    samples = [{"input_ids": row, "labels": row} for row in tokens]
    statistics = peftx.compression.collect(tiny_model("llama"), samples)
    peftx.compression.compress(tiny_model("llama"), statistics, keep=0.6)[0].save_pretrained(tmp_path / "small")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    (tmp_path / "program.py").write_text(PROGRAM)
    found = done(*RUN, tmp_path / "program.py", tmp_path, cwd=tmp_path)
    assert found.returncode == 3, found.stderr
    *seen, there = json.loads(found.stdout)
    assert seen == [True, "True\n", "False\n", "LlamaForCausalLM"]
    torch.testing.assert_close(torch.tensor(there), logits(model, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "accelerate outside"])
def test_launchers_start_it_and_are_started_by_it(tmp_path, launcher):
    (tmp_path / "program.py").write_text(
        "import os, sys, time\nout, rank = sys.argv[1], os.environ.get('RANK', '0')\n"
        f"open(out + '-' + rank, 'w').write(str([sys.argv[1:], {HOOKED}]))\n"
        "while not os.path.exists(f\"{out}-{int(os.environ.get('WORLD_SIZE', '1')) - 1}\"): time.sleep(0.1)\n"
        "sys.exit(rank == '0')"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command = {
        "torchrun": [*torchrun, *RUN[1:]],
        "accelerate": [*accelerate, *RUN[1:]],
        "accelerate outside": [*RUN, *accelerate[1:]],
    }[launcher]
    found = done(*command, tmp_path / "program.py", "--out", "--help", cwd=tmp_path)
    assert found.returncode == 1 and "exit" in found.stderr
    files = sorted(tmp_path.glob("--out*"))
    assert len(files) == (2 if launcher == "torchrun" else 1)
    assert {file.read_text() for file in files} == {"[['--out', '--help'], True]"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="needs trl")
def test_the_command_line_of_trl_runs():
    found = done(*RUN, "trl", "sft", "--help")
    assert found.returncode == 0 and "trl sft" in found.stdout and "--model_name_or_path" in found.stdout


def test_the_hook_is_in_the_package_and_knows_compressed_models():
    assert f'COMPRESSED = "{QUANT_METHOD}"' in (launch.HOOK / "sitecustomize.py").read_text()
