"""Nothing that one client sends ends a federation or decides it, nothing is spent twice, and no private text leaves."""

import contextlib
import json
import logging
import multiprocessing
import threading
from types import SimpleNamespace

import pytest
import torch
from test_federated import (
    NODES,
    ORIGIN,
    PRIVATE,
    SETTINGS,
    SHAPES,
    answering,
    both,
    data_of,
    equal,
    model_of,
    one_round,
    packed,
    random_state,
    reply,
    rows,
    run,
    with_examples,
)

pytest.importorskip("flwr")
pytest.importorskip("opacus")

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.exception import AggregationError
from peft import LoraConfig

from peftx.federated.accounting import BudgetExceeded, epsilon_spent
from peftx.federated.apps import make_client_app, make_server_app
from peftx.federated.checks import AuditEntry, Limits, Rejected, Reply, admit, capped, check_state, read_state
from peftx.federated.grid import InProcessGrid, run_in_process
from peftx.federated.ledger import load_history, spending
from peftx.federated.local import LocalSettings
from peftx.federated.messages import to_record
from peftx.federated.privacy import DPSpec
from peftx.federated.state import global_state
from peftx.federated.strategy import METHODS, FedSVDStrategy

SECRET = "patient 4711 has the flu"


def sending(node: int, method: str, value: float, name: str = "a.lora_B") -> Reply:
    """A client whose array `name` is `value` everywhere."""
    good = reply(node) if METHODS[method] == "B" else both(node, own_A=True)
    return Reply(node, {**good.arrays, **packed({name: torch.full(SHAPES[name], value)})}, {"num-examples": 10})


# Limits are the same on both sides


@pytest.mark.parametrize("value", [6.1e4, -1e6, 3e38])
@pytest.mark.parametrize("method", METHODS)
def test_what_clients_refuse_a_server_refuses_from_a_client(method, value):
    bad = sending(3, method, value)
    array = {"a.lora_B": bad.arrays["a.lora_B"]}
    with pytest.raises(Rejected, match="magnitude"):
        read_state(array, {"a.lora_B": SHAPES["a.lora_B"]})
    good = reply(2) if METHODS[method] == "B" else both(2, own_A=True)
    found, alone = (
        one_round({2: good, 3: other, 4: RuntimeError()}, FedSVDStrategy(method)) for other in (bad, OSError())
    )
    assert equal(found.sent(), alone.sent())
    assert "a.lora_B: a value of magnitude" in found.audit[0].reason


@pytest.mark.parametrize("method", METHODS)
def test_no_reply_leads_to_a_state_that_clients_refuse(method):
    """Of two clients nobody can say which is right. Within the limits, B turned into the basis of A is beyond them."""
    names = ["a.lora_B", "a.lora_A"] if METHODS[method] == "AB" else ["a.lora_B"]
    for value in (5.9e4, 59.0):
        bad = sending(3, method, 5.9e4)
        bad = Reply(
            3, {**bad.arrays, **packed({names[-1]: torch.full(SHAPES[names[-1]], value)})}, {"num-examples": 10}
        )
        good = reply(2) if METHODS[method] == "B" else both(2, own_A=True)
        strategy = FedSVDStrategy(method)
        with InProcessGrid(answering({2: good, 3: bad}), 2) as grid:
            strategy.start(grid, to_record(random_state(0)), num_rounds=3)
        sent = strategy.sent()
        shapes = {name: tuple(tensor.shape) for name, tensor in sent.items()}
        assert equal(read_state(packed(sent), shapes, orthonormal=strategy.refactorized), sent)  # a client's own check
        assert strategy.round == 3 and not strategy.skipped


def test_a_reply_that_spoils_the_average_is_dropped_as_if_it_had_not_come():
    bad = Reply(
        3, {**reply(3).arrays, **packed({"a.lora_B": torch.full(SHAPES["a.lora_B"], 5.9e4)})}, {"num-examples": 10}
    )
    limits = Limits(median_factor=None)
    found = one_round({2: reply(2), 3: bad, 4: reply(4)}, FedSVDStrategy(limits=limits, weight_cap=None))
    # B' = B A A'^T: rows of 5.9e4 times a sum of A's rows that is longer than 1
    (entry,) = found.audit
    assert entry.node == 3 and entry.reason.startswith(
        "clients would refuse the average: a.lora_B: a value of magnitude"
    )
    assert equal(found.state, one_round({2: reply(2), 3: OSError(), 4: reply(4)}).state)


def test_a_server_starts_from_what_clients_load():
    huge = {**random_state(0), "a.lora_A": torch.full(SHAPES["a.lora_A"], 7e4)}
    with (
        InProcessGrid(answering({}), 1) as grid,
        pytest.raises(Rejected, match=r"a\.lora_A: a value of magnitude 7e\+04"),
    ):
        FedSVDStrategy().start(grid, to_record(huge))


def test_residuals_have_one_limit_too():
    pair = {"a.residual_B": torch.full((8, 3), 30.0), "a.residual_A": torch.full((3, 6), 30.0)}
    with pytest.raises(Rejected, match=r"a: a residual of norm 1\.9e\+04"):
        check_state(pair)
    check_state({name: value / 5 for name, value in pair.items()})  # 9 sqrt(48) 900 / 25 = 749
    with pytest.raises(Rejected, match="without its other factor"):
        check_state({"a.residual_B": pair["a.residual_B"]})
    with pytest.raises(Rejected, match="shapes"):
        check_state({**pair, "a.residual_A": torch.ones(2, 6)})


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda known: known.update(round=-1), "round"),
        (lambda known: known.update(round=True), "round"),
        (lambda known: known.update(refactorized="no"), "refactorized"),
        (lambda known: known.update(audit=[{"round": "x", "node": 1, "reason": "y"}]), "audit"),
        (lambda known: known.update(audit=None), "iterable"),
        (lambda known: known.update(state=None), "NoneType"),
        (lambda known: known.update(refactorized=True), "orthonormal"),
    ],
)
def test_a_damaged_checkpoint_is_refused_whole(tmp_path, harm, word):
    strategy = one_round({node: reply(node) for node in NODES}, FedSVDStrategy("ffa-lora", checkpoints=tmp_path))
    known = json.loads((tmp_path / "strategy.json").read_text())
    harm(known)
    (tmp_path / "strategy.json").write_text(json.dumps(known))
    fresh = FedSVDStrategy("ffa-lora")
    with pytest.raises(ValueError, match=rf"no checkpoint.*{word}"):
        fresh.resume(tmp_path)
    assert not fresh.state and fresh.round == 0 and not fresh.audit and strategy.round == 1


# The weight of one client


def test_a_number_of_examples_is_capped_by_the_others():
    assert capped([12, 12, 10**7], 10.0) == [12, 12, 120]
    assert capped([12, 10**7], 10.0) == [12, 120]
    assert capped([10**7], 10.0) == [10**7] and capped([], 10.0) == []
    assert capped([1, 10**7], 0.5) == [1, 1]
    assert capped([3, 4, 30, 31, 1000], 10.0) == [3, 4, 30, 31, 170]  # (4 + 30) / 2
    assert capped([12, 10**7, 12], None) == [12, 10**7, 12]
    honest = [64, 120, 600, 90, 300]
    assert capped(honest, 10.0) == honest


@pytest.mark.parametrize("method", METHODS)
def test_one_client_does_not_turn_the_average_by_what_it_says_of_itself(method):
    make = (lambda node: reply(node, 12)) if METHODS[method] == "B" else (lambda node: both(node, own_A=True))
    answers = {node: with_examples(12, make(node)) for node in NODES}
    liar = {**answers, 4: with_examples(10**7, answers[4])}
    wanted = {**answers, 4: with_examples(120, answers[4])}
    found, told = one_round(liar, FedSVDStrategy(method)), one_round(wanted, FedSVDStrategy(method, weight_cap=None))
    assert equal(found.sent(), told.sent()) and told.audit == []
    assert found.audit == [
        AuditEntry(1, 4, "10000000 examples count as 120, 10 times the median of the others'", action="capped")
    ]
    believed = one_round(liar, FedSVDStrategy(method, weight_cap=None))
    assert not equal(believed.sent(), found.sent())
    assert one_round(liar, FedSVDStrategy(method, weighting="uniform")).audit == []


def test_nor_the_mean_of_the_metrics():
    app = ClientApp()

    @app.evaluate()
    def evaluate(message, context):
        n, accuracy = {2: (10, 0.5), 3: (10, 0.7), 4: (10**7, 0.0)}[context.node_id]
        metrics = MetricRecord({"num-examples": n, "accuracy": accuracy, "loss": 1e300})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    strategy = FedSVDStrategy(evaluate_clients=True)
    with InProcessGrid(app, 3) as grid:
        messages = strategy.configure_evaluate(1, to_record(ORIGIN), ConfigRecord(), grid)
        found = strategy.aggregate_evaluate(1, grid.send_and_receive(messages))
    assert dict(found) == {"accuracy": pytest.approx(12 / 120)}
    assert [(entry.node, entry.action) for entry in strategy.audit] == [(4, "capped")]


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_cap": 0},
        {"weight_cap": float("nan")},
        {"weight_cap": True},
        {"max_failed_rounds": -1},
        {"max_failed_rounds": 1.5},
        {"min_valid": True},
        {"min_nodes": 1.5},
        {"clients_per_round": "3"},
    ],
)
def test_settings_of_a_strategy_are_numbers(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FedSVDStrategy(**settings)
    for limits in ({"max_examples": float("nan")}, {"max_error": 0}, {"median_factor": True}, {"max_update_norm": "1"}):
        with pytest.raises(ValueError, match=next(iter(limits))):
            Limits(**limits)


# Rounds that fail, and how a run ends


@pytest.mark.parametrize("end", ["exit", "nothing", "empty", "metrics alone"])
def test_a_client_that_answers_nothing_is_dropped(end):
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_id != 3:
            return answering({node: reply(node) for node in NODES})(message, context)
        if end == "exit":
            raise SystemExit(3)
        metrics = {"metrics": MetricRecord({"num-examples": 1})} if end == "metrics alone" else {}
        return None if end == "nothing" else Message(RecordDict(metrics), reply_to=message)

    strategy = FedSVDStrategy()
    with InProcessGrid(app, 3) as grid:
        strategy.start(grid, to_record(random_state(0)), num_rounds=1)
    assert [entry.node for entry in strategy.audit] == [3]
    assert equal(strategy.state, one_round({2: reply(2), 3: OSError(), 4: reply(4)}).state)


def by_round(answers) -> ClientApp:
    """Clients that send what `answers` has for the round and the node."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        found = answers(message.content["config"]["server-round"])
        return answering(found)(message, context)

    return app


def test_a_round_without_a_valid_reply_is_skipped():
    good = {node: reply(node) for node in NODES}
    bad = {2: OSError("asleep"), 3: with_examples(0, reply(3)), 4: OSError("asleep")}
    strategy = FedSVDStrategy(refactorize_every=0)
    with InProcessGrid(by_round(lambda number: bad if number in (1, 3) else good), 3) as grid:
        result = strategy.start(grid, to_record(random_state(0)), num_rounds=4)
    plain = FedSVDStrategy(refactorize_every=0)
    with InProcessGrid(answering(good), 3) as grid:
        plain.start(grid, to_record(random_state(0)), num_rounds=2)
    assert equal(strategy.state, plain.state) and strategy.round == 4
    assert list(strategy.skipped) == [1, 3] and "asleep" in strategy.skipped[3] and len(strategy.audit) == 6
    assert result.train_metrics_clientapp[3] == MetricRecord({"admitted": 0, "dropped": 3, "skipped": 1})
    assert result.train_metrics_clientapp[4]["admitted"] == 3 and "skipped" not in result.train_metrics_clientapp[4]


@pytest.mark.parametrize(("allowed", "ends"), [(0, 2), (2, 4)])
def test_failed_rounds_in_a_row_are_bounded(allowed, ends):
    good = {node: reply(node) for node in NODES}
    bad = dict.fromkeys(NODES, OSError("gone"))
    strategy = FedSVDStrategy(max_failed_rounds=allowed)
    with (
        InProcessGrid(by_round(lambda number: good if number == 1 else bad), 3) as grid,
        pytest.raises(
            AggregationError,
            match=rf"max_failed_rounds={allowed} rounds in a row failed; the last one, round {ends}: 0 of 3.*gone",
        ),
    ):
        strategy.start(grid, to_record(random_state(0)), num_rounds=50)
    assert strategy.round == ends and equal(strategy.state, one_round(good).state)


def test_nodes_that_are_away_fail_a_round_and_no_more(monkeypatch):
    good = {node: reply(node) for node in NODES}
    strategy, connected = FedSVDStrategy(min_nodes=3, connect_timeout=0.0), []
    with InProcessGrid(answering(good), 3) as grid:
        nodes = grid.get_node_ids()
        monkeypatch.setattr("time.sleep", lambda _: None)
        monkeypatch.setattr(grid, "get_node_ids", lambda: nodes[: 1 if not connected or len(connected) < 3 else 3])
        connect = strategy._connected
        strategy._connected = lambda grid: connected.append(1) or connect(grid)
        strategy.start(grid, to_record(random_state(0)), num_rounds=4)
    assert list(strategy.skipped) == [1, 2] and "min_nodes=3" in strategy.skipped[1]
    assert strategy.round == 4 and not equal(strategy.state, random_state(0))


class Stop(BaseException):
    """Neither an error nor a keyboard's."""


@pytest.mark.parametrize("end", [KeyboardInterrupt(), Stop("now"), ValueError("a bug"), OSError("disk")])
@pytest.mark.parametrize("where", ["client", "evaluation"])
def test_the_output_is_written_whatever_ends_the_run(tmp_path, end, where):
    def data(context):
        if where == "client" and not isinstance(end, Exception) and turn() == 3:
            raise end
        if where == "client" and isinstance(end, Exception) and turn() > 2:
            raise end
        return data_of(context)

    def measure(model, context):
        if where == "evaluation" and turn() == 2:
            raise end
        return {"ok": 1.0}

    strategy = FedSVDStrategy(max_failed_rounds=1)
    turn = lambda: strategy.round + 1
    folder = tmp_path / "out"
    server = make_server_app(model_of, strategy, num_rounds=9, evaluate=measure, output=folder)
    with pytest.raises((AggregationError, type(end))):
        run_in_process(server, make_client_app(model_of, data, SETTINGS), 2)
    found = json.loads((folder / "metrics.json").read_text())
    text = "gone" if str(end) == "" else str(end)
    assert text in found["error"] or type(end).__name__ in found["error"]
    done = {"client": 2, "evaluation": 1}[where]
    assert [number for number, metrics in found["train"].items() if "skipped" not in metrics] == [
        str(number) for number in range(1, done + 1)
    ]
    again = FedSVDStrategy()
    again.resume(folder)
    assert equal(again.state, strategy.state) and again.round == strategy.round >= done
    assert not list(folder.glob("*.part"))


def test_a_spent_budget_leaves_an_output(tmp_path):
    spec = DPSpec(epsilon=8.0, delta=1e-3, accountant="rdp", noise_seed=0)
    strategy = FedSVDStrategy(private=True, max_failed_rounds=1)
    server = make_server_app(model_of, strategy, num_rounds=9, output=tmp_path)
    with pytest.raises(AggregationError, match="max_failed_rounds=1 rounds in a row failed.*budget"):
        run_in_process(server, make_client_app(model_of, data_of, SETTINGS, privacy=spec, rounds=2), 2)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["skipped"].keys() == {"3", "4"} and "budget" in found["error"] and len(found["audit"]) == 4
    resumed = FedSVDStrategy(private=True)
    resumed.resume(tmp_path)
    assert equal(resumed.state, strategy.state)


def test_the_state_is_on_disk_after_every_round(tmp_path):
    """A process that is killed writes nothing more."""
    rounds = []

    def measure(model, context):
        if (tmp_path / "strategy.json").exists():
            rounds.append(json.loads((tmp_path / "strategy.json").read_text())["round"])
        return {}

    server = make_server_app(model_of, FedSVDStrategy(), num_rounds=2, evaluate=measure, output=tmp_path)
    run_in_process(server, make_client_app(model_of, data_of, SETTINGS), 1)
    assert rounds == [1, 2]
    assert json.loads((tmp_path / "metrics.json").read_text())["error"] is None


def test_an_output_that_cannot_be_is_said_before_the_first_round(tmp_path):
    (tmp_path / "out").write_text("a file")
    calls = []
    server = make_server_app(
        lambda _: calls.append(1) or model_of(), FedSVDStrategy(), num_rounds=1, output=tmp_path / "out"
    )
    with pytest.raises(FileExistsError):
        run_in_process(server, make_client_app(model_of, data_of, SETTINGS), 1)
    assert not calls


# An epsilon is spread over rounds

EPSILON = DPSpec(epsilon=8.0, delta=1e-3, accountant="rdp", noise_seed=0)


def test_an_epsilon_is_planned_over_the_rounds_that_the_server_announces():
    strategy, _, grid = run(FedSVDStrategy(private=True), 3, clients=2, privacy=EPSILON)
    assert strategy.audit == [] and strategy.round == 3
    ((sigma, rate, steps),) = load_history(grid.contexts[2])
    assert (rate, steps) == (1 / 3, 9) and sigma == EPSILON.solve(1 / 3, 9)
    assert 7.9 < grid.contexts[2].state["privacy"]["epsilon"] <= 8.0


def test_without_any_number_of_rounds_an_epsilon_is_refused():
    app = make_client_app(model_of, data_of, SETTINGS, privacy=EPSILON)
    with InProcessGrid(app, 1) as grid:
        messages = FedSVDStrategy().configure_train(1, to_record(global_state(model_of())), ConfigRecord(), grid)
        (answer,) = grid.send_and_receive(messages)
        assert answer.has_error() and "how many: give `rounds`" in answer.error.reason
        assert "privacy" not in grid.contexts[2].state  # nothing was spent
        grid.run_config["rounds"] = 4
        messages = FedSVDStrategy().configure_train(1, to_record(global_state(model_of())), ConfigRecord(), grid)
        (answer,) = grid.send_and_receive(messages)
    assert not answer.has_error()
    assert load_history(grid.contexts[2])[0][0] == EPSILON.solve(1 / 3, 12)
    for rounds in (0, -1, 1.5, True, "many"):
        with pytest.raises(ValueError, match="rounds"):
            make_client_app(model_of, data_of, SETTINGS, privacy=EPSILON, rounds=rounds)
        with pytest.raises(ValueError, match="rounds"):
            run_in_process(make_server_app(model_of, FedSVDStrategy(), num_rounds=rounds), app, 1)


# The ledger

SPEC = DPSpec(noise_multiplier=1.0, delta=1e-3, accountant="rdp")
LOCAL = LocalSettings(steps=3, batch_size=8)
ONE = [1.0, 1 / 3, 3]  # what a round of LOCAL over 24 records costs


def node() -> SimpleNamespace:
    return SimpleNamespace(state=RecordDict())


BROKEN = {
    "null": "null",
    "a list": "[]",
    "a string": '""',
    "a number": "0",
    "nothing": "",
    "half": '{"history": [[1.0, 0.5',
    "no fields": "{}",
    "null history": '{"history": null}',
    "a dict of a history": '{"history": {}}',
    "a text of a history": '{"history": ""}',
    "false": '{"history": false}',
    "an epsilon alone": '{"epsilon": 1.0}',
    "a flat history": '{"history": [1.0, 0.5, 3]}',
    "entries of text": '{"history": ["abc"]}',
    "entries of dicts": '{"history": [{"a": 1, "b": 2, "c": 3}]}',
    "four numbers": '{"history": [[1.0, 0.5, 3, 4]]}',
    "negative noise": '{"history": [[-1.0, 0.5, 3]]}',
    "NaN": '{"history": [[NaN, 0.5, 3]]}',
    "Infinity": '{"history": [[Infinity, 0.5, 3]]}',
    "a bool of noise": '{"history": [[false, 0.5, 3]]}',
    "a bool of a rate": '{"history": [[1.0, true, 3]]}',
    "a rate of 0": '{"history": [[1.0, 0, 3]]}',
    "a rate of NaN": '{"history": [[1.0, NaN, 3]]}',
    "negative steps": '{"history": [[1.0, 0.5, -3]]}',
    "steps of a float": '{"history": [[1.0, 0.5, 3.0]]}',
    "steps of a bool": '{"history": [[1.0, 0.5, true]]}',
    "steps without end": '{"history": [[1.0, 0.5, 1' + "0" * 400 + "]]}",
    "noise without end": '{"history": [[1' + "0" * 400 + ", 0.5, 3]]}",
    "a field of the future": '{"history": [[1.0, 0.5, 3]], "version": 2}',
    "a field twice": '{"history": [[1.0, 0.5, 3]], "history": []}',
    "an epsilon of text": '{"history": [[1.0, 0.5, 3]], "epsilon": "1"}',
    "a negative epsilon": '{"history": [[1.0, 0.5, 3]], "epsilon": -1}',
    "an epsilon of NaN": '{"history": [[1.0, 0.5, 3]], "epsilon": NaN}',
    "an epsilon after nothing": '{"history": [], "epsilon": 5.9}',
    "too deep": "[" * 10**5,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_ledger_that_holds_no_history_is_not_nothing_spent(tmp_path, broken):
    ledger = tmp_path / "spent.json"
    ledger.write_text(BROKEN[broken])
    with pytest.raises(ValueError, match="spent.json"), spending(node(), ledger, SPEC, 24, LOCAL, None):
        raise AssertionError("a round was trained")
    assert ledger.read_text() == BROKEN[broken]


def test_nor_is_a_state_of_the_node_or_a_folder(tmp_path):
    for history in ("null", "{}", "0", '""', "[[1.0, 0.5, true]]"):
        context = node()
        context.state["privacy"] = ConfigRecord({"history": history})
        with pytest.raises(ValueError, match="the node's state"):
            load_history(context)
    with pytest.raises(ValueError, match="is no file"):
        load_history(node(), tmp_path)
    with pytest.raises(ValueError, match="no folder"), spending(node(), tmp_path / "a" / "b", SPEC, 24, LOCAL, None):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "spent.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"spent\.json is no JSON"):
        load_history(node(), tmp_path / "spent.json")
    with pytest.raises(ValueError, match="list of"):
        epsilon_spent({}, 1e-3)
    with pytest.raises(ValueError, match="list of"):
        epsilon_spent("", 1e-3)


def test_a_private_client_with_such_a_ledger_sends_nothing(tmp_path):
    for text in ('{"history": null}', "{}", '""'):
        ledger = tmp_path / "spent.json"
        ledger.write_text(text)
        with pytest.raises(AggregationError, match="its own log tells"):
            run(FedSVDStrategy(private=True), 1, clients=1, privacy=PRIVATE, ledger=ledger)
        assert ledger.read_text() == text


def test_a_round_is_on_record_before_it_is_trained_and_off_it_if_it_fails(tmp_path):
    ledger, context = tmp_path / "spent.json", node()
    with spending(context, ledger, SPEC, 24, LOCAL, None) as before:
        assert before is None and load_history(node(), ledger) == [ONE]
    with pytest.raises(Stop), spending(context, ledger, SPEC, 24, LOCAL, None) as before:
        assert before == [ONE] and load_history(node(), ledger) == [[1.0, 1 / 3, 6]]
        with spending(node(), ledger, SPEC, 24, LocalSettings(steps=5, batch_size=8), None):
            pass  # another run's round, meanwhile
        with spending(node(), ledger, SPEC, 24, LocalSettings(steps=7, batch_size=12), None):
            pass
        raise Stop
    left = [[1.0, 1 / 3, 8], [1.0, 1 / 2, 7]]
    assert load_history(context, ledger) == load_history(context) == left
    assert json.loads(ledger.read_text())["epsilon"] == epsilon_spent(left, 1e-3, "rdp")


def spend(ledger, spec, ready, go, taken) -> None:
    ready.release()
    go.wait()
    rounds = 0
    try:
        for _ in range(6):
            with contextlib.suppress(BudgetExceeded), spending(node(), ledger, spec, 24, LOCAL, 12):
                rounds += 1
    except Exception as error:
        rounds = repr(error)
    taken.put(rounds)


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_runs_that_overlap_spend_one_budget(tmp_path, kind):
    spec = DPSpec(epsilon=6.0, delta=1e-3, accountant="rdp")
    spec.solve(1 / 3, 12)  # four rounds of three steps; forked processes have it solved
    context = multiprocessing.get_context("fork") if kind == "processes" else None
    if context is None:
        import queue

        ready, go, taken, make = threading.Semaphore(0), threading.Event(), queue.Queue(), threading.Thread
    else:
        ready, go, taken, make = context.Semaphore(0), context.Event(), context.Queue(), context.Process
    ledger = tmp_path / "spent.json"
    runs = [make(target=spend, args=(ledger, spec, ready, go, taken)) for _ in range(3)]
    for one in runs:
        one.start()
    for _ in runs:
        ready.acquire()
    go.set()
    rounds = [taken.get() for _ in runs]
    for one in runs:
        one.join()
    (entry,) = load_history(node(), ledger)
    assert sum(rounds) == 4 and entry[2] == 12
    assert epsilon_spent([entry], 1e-3, "rdp") <= 6.0


def test_a_ledger_is_one_by_whatever_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "spent.json")
    for name in ("link.json", "real/../real/spent.json"):
        run(FedSVDStrategy(private=True), 1, clients=1, privacy=PRIVATE, ledger=tmp_path / name)
    assert (tmp_path / "link.json").is_symlink()
    assert load_history(node(), tmp_path / "real" / "spent.json") == [[1.0, 1 / 3, 6]]


# No text of a private client's user code


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError(SECRET)


ERRORS = [
    Rejected(SECRET),
    BudgetExceeded,
    ValueError(SECRET),
    KeyError(SECRET),
    SystemExit(SECRET),
    Stop(SECRET),
    Odd(),
    AggregationError(SECRET),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: getattr(error, "__name__", type(error).__name__))
@pytest.mark.parametrize("where", ["build_model", "load_data", "settings", "collator", "row", "ledger", "model"])
def test_errors_of_user_code_stay_at_home(where, error, caplog):
    error = error(SECRET) if isinstance(error, type) else error

    def fail(*_):
        raise error

    class Rows(list):
        __getitem__ = fail

    def build(context):
        if where == "build_model":
            fail()
        model = model_of()
        if where == "model":
            model.base_model.model.bert.register_forward_pre_hook(fail)
        return model

    def data(context):
        if where == "load_data":
            fail()
        return (Rows(rows(0)) if where == "row" else rows(0)), (fail if where == "collator" else None)

    settings = fail if where == "settings" else SETTINGS
    app = make_client_app(build, data, settings, privacy=PRIVATE, ledger=fail if where == "ledger" else None)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    try:
        with InProcessGrid(app, 1) as grid:
            state = to_record(global_state(model_of()))
            (answer,) = grid.send_and_receive(FedSVDStrategy().configure_train(1, state, ConfigRecord(), grid))
    finally:
        logging.getLogger("flwr").setLevel(logging.ERROR)
    assert answer.has_error()
    fixed = ("an error that its own log tells", "the privacy budget of this client does not allow another round")
    assert answer.error.reason in fixed and SECRET not in str(answer.error)
    assert not load_history(grid.contexts[2])  # nothing was sent, nothing is spent


def test_what_a_server_sent_wrong_is_told(caplog):
    """It is the server's own, and no data were looked at."""
    app = make_client_app(model_of, lambda context: 1 / 0, SETTINGS, privacy=PRIVATE)
    state = {name: torch.full_like(value, 1e5) for name, value in global_state(model_of()).items()}
    with InProcessGrid(app, 1) as grid:
        strategy = FedSVDStrategy()
        strategy.state = state
        (answer,) = grid.send_and_receive(strategy.configure_train(1, to_record(state), ConfigRecord(), grid))
    assert "a value of magnitude 1e+05" in answer.error.reason


def test_a_client_without_privacy_tells_what_went_wrong():
    app = make_client_app(model_of, lambda context: 1 / 0, SETTINGS)
    with InProcessGrid(app, 1) as grid:
        state = to_record(global_state(model_of()))
        (answer,) = grid.send_and_receive(FedSVDStrategy().configure_train(1, state, ConfigRecord(), grid))
    assert "ZeroDivisionError" in answer.error.reason


def test_the_adapters_of_all_methods_take_part_in_this():
    """A client of FedEx-LoRA, too, whose server adds residuals up, is never sent what it refuses."""
    lora = lambda context=None: model_of(config=LoraConfig)
    settings = LocalSettings(steps=2, batch_size=8, learning_rate=1e-2, optimizer="adamw")
    strategy, _, _ = run(FedSVDStrategy("fedex-lora"), 4, clients=2, build=lora, factors="AB", settings=settings)
    assert strategy.audit == [] and not strategy.skipped


def test_admission_caps_by_default():
    admitted, entries = admit([reply(2, 12), reply(3, 12), reply(4, 10**7)], ORIGIN, asked=NODES, round=1)
    assert [one.examples for one in admitted] == [12, 12, 120] and [entry.action for entry in entries] == ["capped"]
