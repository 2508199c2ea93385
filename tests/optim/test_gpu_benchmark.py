"""benchmarks/gpu.py's manners: one failing, hanging or late contender or part is told and ends nothing."""

import argparse
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    import gpu

    yield gpu
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def race(gpu, monkeypatch):
    monkeypatch.setattr(sys.modules["race"], "settle", lambda device: 0)  # collects the garbage of all tests
    return gpu.Race(gpu.Clock(time.time() + 600), lambda rows: None, dry=True)


def test_ratios_are_medians_of_pairs_and_failures_are_rows(race):
    times = {"yardstick": [9.0, 1.0, 2.0], "twice": [9.0, 2.0, 4.0], "fails later": [9.0, 1.0]}

    def fail():
        raise RuntimeError("no such | thing\nand more")

    def refuse():
        raise NotImplementedError("not for experts")

    for name, found in times.items():
        race.enter(name, lambda found=found: iter(found))
    race.enter("fails", fail)
    race.enter("refuses", refuse)
    race.run("step", next, "yardstick")  # the first of each does not count
    assert (race.rows["yardstick"]["step"], race.rows["twice"]["step"], race.rows["twice"]["step rounds"]) == (1, 2, 2)
    assert race.rows["fails"] == {"contender": "fails", "note": "failed: RuntimeError: no such / thing"}
    assert race.rows["refuses"]["note"] == "refused: not for experts"
    assert race.rows["fails later"]["note"] == "failed: StopIteration: no message"
    assert list(race.alive) == ["yardstick", "twice"]
    race.compare("memory", lambda turns: 2**20 if turns is race.alive["yardstick"] else 3 * 2**20, "yardstick")
    assert (race.rows["twice"]["memory MiB"], race.rows["twice"]["memory"]) == (3, 3)


def test_without_the_yardstick_there_are_times_but_no_ratios(race):
    race.enter("yardstick", lambda: 1 / 0)
    race.enter("other", lambda: 2.0)
    race.run("step", float, "yardstick")
    race.compare("memory", int, "yardstick")
    assert race.rows["other"]["step ms"] == 2000 and "step" not in race.rows["other"]
    assert race.rows["other"].keys() >= {"memory MiB"} and "memory" not in race.rows["other"]


def test_who_takes_too_long_is_out_and_who_comes_too_late_is_skipped(gpu, race):
    def forever():
        while True:
            time.sleep(0.001)

    race.enter("yardstick", lambda: 1.0)
    race.clock = gpu.Clock(time.time() + 0.4)
    race.enter("hangs", forever)
    assert race.rows["hangs"]["note"].startswith("failed: TimeoutError")
    race.clock.until = race.clock.start + 1e-6
    race.enter("late", lambda: 1.0)
    assert race.rows["late"]["note"] == gpu.LATE and list(race.alive) == ["yardstick"]
    race.run("step", float, "yardstick")
    race.compare("memory", int, "yardstick")
    assert race.rows["yardstick"]["note"] == "step: no time left; memory: no time left"


WRITES = """
import json, sys
with open(sys.argv[sys.argv.index("--into") + 1], "w") as stream:
    json.dump({"rows": [{"contender": "a"}], "note": ""}, stream)
"""


@pytest.mark.parametrize(
    ("code", "note"),
    [
        (f"{WRITES}import time; time.sleep(600)", "failed: ended by force when its time was over"),
        (f"{WRITES}sys.exit('CUDA error')", "failed: ended with code 1; CUDA error"),
        (WRITES, ""),
        ("import os; os.abort()", "failed: ended with code -6"),
    ],
)
def test_what_a_part_found_outlives_its_end(gpu, code, note, tmp_path, monkeypatch):
    (tmp_path / "part.py").write_text(code)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "part.py"))
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    seconds = 1.0 if "sleep" in code else 60
    outcome = gpu.apart("dense", time.time() + seconds, argparse.Namespace(dry=False, methods=None))
    assert outcome == {"rows": [{"contender": "a"}] if "json" in code else [], "note": note}
    page = gpu.markdown({"dense": outcome})
    assert note in page and len({line.count("|") for line in page.splitlines()}) == 1


def test_a_part_that_fails_keeps_what_it_has(gpu, monkeypatch):
    def part(race, chosen):
        race.note("a", "fine")
        raise ValueError("no card")

    monkeypatch.setitem(gpu.PARTS, "dense", part)
    monkeypatch.setattr(gpu.transformers.utils.logging, "set_verbosity_error", lambda: None)  # of this process
    outcome = gpu.here("dense", time.time() + 60, argparse.Namespace(dry=True, methods=None))
    assert outcome["rows"] == [{"contender": "a", "note": "fine"}] and outcome["note"] == "failed: ValueError: no card"


def test_time_is_shared_out_and_never_overdrawn(gpu, monkeypatch):
    now, given = [1000.0], {}

    class Time:
        time = staticmethod(lambda: now[0])

    def run(part, until, args):
        given[part] = until + gpu.GRACE - now[0]
        now[0] += {"dense": 10.0}.get(part, given[part])  # all but the first take all that they may
        return {"rows": [], "note": ""}

    monkeypatch.setattr(gpu, "time", Time)
    monkeypatch.setattr(gpu, "apart", run)
    args = argparse.Namespace(parts=[*gpu.PARTS], minutes=8.0, dry=False)
    found = gpu.everything(args)
    assert given.keys() == gpu.PARTS.keys() and now[0] == pytest.approx(1480)
    assert given["dense"] == pytest.approx(480 * gpu.SHARES["dense"]) and given["experts"] > 480 * gpu.SHARES["experts"]
    now[0], args.minutes = 1000.0, 0.6
    found = gpu.everything(args)
    assert found["dense"]["note"] == gpu.LATE and now[0] <= 1036


def test_base_weights_are_shared_and_who_writes_to_them_is_caught(gpu, race):
    base, batch = gpu.frozen("llama", race, layers=1)
    config = gpu.methods([], again=False)["LoRA"]
    racers = [gpu.Racer(base, batch, config, "cpu") for _ in range(2)]
    places = {p.data_ptr() for p in base.parameters()}
    for racer in racers:
        held = [p for p in racer.model.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in held} == places and all(p.grad is None for p in held)

    def write(model):
        next(model.parameters()).data.add_(1)

    with pytest.raises(RuntimeError, match="wrote to the base weights"):
        gpu.Racer(base, batch, config, "cpu", write)


@pytest.mark.slow
def test_a_part_runs_in_a_process_of_its_own(gpu):
    outcome = gpu.apart("optimizer", time.time() + 300, argparse.Namespace(dry=True, methods=["bone"]))
    assert outcome["note"] == "" and outcome["device"] and len(outcome["rows"]) == 3 * len(gpu.ADAMS) + 4
    notes = {row["contender"]: row.get("note", "") for row in outcome["rows"]}
    assert not any(note.startswith(("failed", "skipped")) for note in notes.values())
    assert notes["rare rows: peftx, embedding_bits=32"] == notes["rare rows: torch AdamW"] != ""
