"""FedSVD on Flower: what a server believes, its rounds, its clients, and the two together in one process."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, tiny_model
from peft import LoraConfig, get_peft_model

import peftx
from peftx.federated import average_B, client_state, fold, global_state, load_global, refactorize, refactorize_model
from peftx.federated.checks import AuditEntry, Limits, Rejected, Reply, admit, read_array, read_state

pytest.importorskip("flwr")
pytest.importorskip("opacus")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.exception import AggregationError
from flwr.supercore.task_identity import TaskIdentity

from peftx.federated.accounting import epsilon_spent
from peftx.federated.apps import make_client_app, make_server_app, receive, set_trainable
from peftx.federated.grid import InProcessGrid, run_in_process
from peftx.federated.ledger import keep_history, load_history
from peftx.federated.local import LocalSettings, train_local
from peftx.federated.messages import to_record
from peftx.federated.partition import dirichlet_partition
from peftx.federated.privacy import DPSpec
from peftx.federated.strategy import FedSVDStrategy

logging.getLogger("flwr").setLevel(logging.ERROR)  # Flower sets its own when it is imported

NODES = (2, 3, 4)
R = 2
SHAPES = {"a.lora_A": (R, 6), "a.lora_B": (8, R), "b.c.lora_A": (R, 8), "b.c.lora_B": (5, R)}


def random_state(seed: int, factors: str = "AB", scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}
    return {name: value for name, value in drawn.items() if name[-1] in factors}


def packed(state: dict[str, torch.Tensor]) -> dict[str, Array]:
    return dict(to_record(state))


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# One reply at a time

ORIGIN = random_state(0, "B")


def reply(node: int, examples: int = 10) -> Reply:
    arrays = packed({name: ORIGIN[name] + 0.1 * value for name, value in random_state(node, "B").items()})
    return Reply(node, arrays, {"num-examples": examples, "loss": 0.5})


def values(one: Reply, change) -> Reply:
    """`one` with `change` done to the values of its first array."""
    name = next(iter(one.arrays))
    return replace(one, arrays={**one.arrays, name: Array(change(one.arrays[name].numpy()))})


def fields(one: Reply, **changed) -> Reply:
    """`one` with other declarations, or bytes, in its first array."""
    name = next(iter(one.arrays))
    old = one.arrays[name]
    known = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data}
    return replace(one, arrays={**one.arrays, name: Array(**{**known, **changed})})


def poisoned(value: float, array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[0, 0] = value
    return array


def forged(one: Reply, shape: tuple, descr: str = "<f4", payload: bytes | None = None) -> Reply:
    """A header that asks for another shape than its payload has, declared honestly outside."""
    old = one.arrays["a.lora_B"]
    stream = SimpleNamespace(parts=[], write=lambda part: stream.parts.append(part))
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return fields(one, data=b"".join(stream.parts) + (old.data[128:] if payload is None else payload))


def metric(one: Reply, **metrics) -> Reply:
    return replace(one, metrics={"num-examples": 10, **metrics})


def with_examples(value, one: Reply) -> Reply:
    return replace(one, metrics={"num-examples": value})


def renamed(one: Reply, **extra: torch.Tensor) -> Reply:
    return replace(one, arrays={**one.arrays, **packed(extra)})


# Row of the specification's table -> what becomes of a good reply, and a word of the audit's reason.
BAD = {
    "NaN": (lambda one: values(one, partial(poisoned, np.nan)), "NaN"),
    "infinite": (lambda one: values(one, partial(poisoned, np.inf)), "infinite"),
    "(1, r), which would broadcast": (lambda one: values(one, lambda v: v[:1]), "shape"),
    "transposed": (lambda one: values(one, lambda v: np.ascontiguousarray(v.T)), "shape"),
    "another rank": (lambda one: values(one, lambda v: np.concatenate([v, v], 1)), "bytes|shape"),
    "one axis": (lambda one: values(one, np.ravel), "shape"),
    "missing key": (lambda one: replace(one, arrays=dict(list(one.arrays.items())[1:])), "missing"),
    "no arrays": (lambda one: replace(one, arrays={}), "missing"),
    "extra key": (lambda one: renamed(one, classifier=torch.ones(2)), "unexpected"),
    "lora_A": (lambda one: replace(one, arrays={**one.arrays, **packed(random_state(1, "A"))}), "lora_A"),
    "10**18 examples": (lambda one: with_examples(10**18, one), "num-examples"),
    "10**400 examples": (lambda one: with_examples(10**400, one), "bits"),
    "negative examples": (lambda one: with_examples(-5, one), "num-examples"),
    "no examples": (lambda one: with_examples(0, one), "num-examples"),
    "NaN examples": (lambda one: with_examples(float("nan"), one), "num-examples"),
    "bool examples": (lambda one: with_examples(True, one), "num-examples"),
    "a list of examples": (lambda one: with_examples([1, 2], one), "num-examples"),
    "examples left out": (lambda one: replace(one, metrics={}), "num-examples"),
    "declared shape": (lambda one: fields(one, shape=(4, 4)), "declared"),
    "declared dtype": (lambda one: fields(one, dtype="float64"), "declared"),
    "float64": (lambda one: values(one, lambda v: v.astype(np.float64)), "dtype|bytes"),
    "float16": (lambda one: values(one, lambda v: v.astype(np.float16)), "dtype"),
    "float16 in the header": (lambda one: forged(one, (8, R), "<f2"), "dtype"),
    "big-endian": (lambda one: forged(one, (8, R), ">f4"), "dtype"),
    "objects": (lambda one: forged(one, (8, R), "|O"), "dtype"),
    "3.6 TiB in the header": (lambda one: forged(one, (10**6, 10**6)), "header"),
    "negative shape in the header": (lambda one: forged(one, (-8, -R)), "header|npy"),
    "payload too short": (lambda one: forged(one, (8, R), payload=b"\0" * 60), "bytes"),
    "payload too long": (lambda one: forged(one, (8, R), payload=b"\0" * 68), "bytes"),
    "payload far too long": (lambda one: fields(one, data=b"\0" * 10**6), "payload"),
    "no npy": (lambda one: fields(one, data=b"\x80\x04" + b"\0" * 60), "npy"),
    "empty": (lambda one: fields(one, data=b""), "npy"),
    "another serialisation": (lambda one: fields(one, stype="torch.save"), "serialised"),
    "1,000 times the others": (lambda one: values(one, lambda v: v + 100), "norm"),
    "the client failed": (lambda one: Reply(one.node, error="ValueError: no data"), "no data"),
}


def test_good_replies_are_admitted_in_the_order_of_their_nodes():
    admitted, entries = admit([reply(4, examples=30), reply(2), reply(3, examples=20)], ORIGIN, asked=NODES, round=1)
    assert [(one.node, one.examples, one.loss) for one in admitted] == [(2, 10, 0.5), (3, 20, 0.5), (4, 30, 0.5)]
    assert entries == []
    for one in admitted:
        sent = {name: torch.from_numpy(array.numpy()) for name, array in one.reply.arrays.items()}
        assert equal(one.tensors(), sent)
        distance = sum((sent[name] - value).double().square().sum() for name, value in ORIGIN.items()) ** 0.5
        assert one.norm == pytest.approx(float(distance), rel=1e-6)


def averaged(admitted) -> dict[str, torch.Tensor]:
    return average_B(random_state(0), [(one.examples, one.tensors()) for one in admitted])


@pytest.mark.parametrize("row", BAD)
def test_a_bad_reply_is_dropped_and_changes_nothing_else(row):
    spoil, word = BAD[row]
    good = [reply(2), reply(4, examples=30)]
    admitted, entries = admit([good[0], spoil(reply(3)), good[1]], ORIGIN, asked=NODES, round=7)
    assert [one.node for one in admitted] == [2, 4]
    (entry,) = entries
    assert (entry.round, entry.node, entry.action) == (7, 3, "dropped")
    assert any(part in entry.reason for part in word.split("|")), entry.reason
    assert len(entry.reason) < 400
    without, _ = admit(good, ORIGIN, asked=(2, 4), round=7)
    assert equal(averaged(admitted), averaged(without))


def test_a_stranger_a_second_reply_and_silence():
    replies = [reply(2), reply(9), reply(2, examples=50)]
    admitted, entries = admit(replies, ORIGIN, asked=NODES, round=1)
    assert [(one.node, one.examples) for one in admitted] == [(2, 10)]
    assert [(e.node, e.reason.split()[0:3]) for e in entries] == [
        (9, ["a", "reply", "from"]),
        (2, ["a", "second", "reply"]),
        (3, ["no", "reply", "in"]),
        (4, ["no", "reply", "in"]),
    ]


def test_a_forged_header_allocates_nothing(monkeypatch):
    """The header says 3.6 TiB: nothing may be read or made before it is compared."""
    one = forged(reply(3), (10**6, 10**6))
    monkeypatch.setattr(np, "load", None)
    monkeypatch.setattr(np, "ndarray", None)
    with pytest.raises(Rejected, match="header"):
        read_array("a.lora_B", one.arrays["a.lora_B"], (8, R))


def test_fortran_order_is_read_as_it_is_meant():
    wanted = ORIGIN["a.lora_B"]
    array = Array(np.asfortranarray(wanted.numpy()))
    assert b"'fortran_order': True" in array.data
    found = read_array("a", array, (8, R))
    assert torch.equal(found, wanted) and found.is_contiguous()


def test_norms_absolute_relative_and_clipped():
    large = values(reply(3), lambda v: v + 100)
    drop = lambda limits, *replies: admit(replies, ORIGIN, asked=NODES[: len(replies)], round=1, limits=limits)
    assert len(drop(Limits(median_factor=None), reply(2), large)[0]) == 2
    assert len(drop(Limits(), reply(2), large)[0]) == 2  # of two, nobody can say which is right
    assert [one.node for one in drop(Limits(max_update_norm=5.0), reply(2), large)[0]] == [2]
    admitted, entries = drop(Limits(max_update_norm=5.0, too_large="clip"), reply(2), large)
    assert [(e.node, e.action) for e in entries] == [(3, "clipped")]
    clipped = admitted[1].tensors()
    distance = sum((clipped[name] - value).double().square().sum() for name, value in ORIGIN.items()) ** 0.5
    assert float(distance) == pytest.approx(5.0, rel=1e-5)
    same = Reply(2, packed(ORIGIN), {"num-examples": 1})
    assert len(drop(Limits(), same, replace(same, node=3), reply(4))[0]) == 3  # a median of zero limits nothing


def test_uniform_weighting_looks_at_no_numbers():
    admitted, entries = admit(
        [with_examples(10**18, reply(2)), replace(reply(3), metrics={})],
        ORIGIN,
        asked=(2, 3),
        round=1,
        count_examples=False,
    )
    assert [one.examples for one in admitted] == [1, 1] and not entries


def test_a_reply_too_large_has_no_say_in_what_is_too_large():
    """Of norms 1, 1, 20, 1000 the median is 10.5, and 1 without the last."""
    spread = lambda node, size: Reply(
        node, packed({n: v + size * torch.ones_like(v) / 26**0.5 for n, v in ORIGIN.items()}), {"num-examples": 1}
    )
    replies = [spread(node, size) for node, size in enumerate((1, 1, 20, 1000))]
    with_it, without = (admit(some, ORIGIN, asked=range(len(some)), round=1) for some in (replies, replies[:3]))
    assert [one.node for one in with_it[0]] == [one.node for one in without[0]] == [0, 1]
    assert with_it[1][0] == without[1][0] and with_it[1][1].node == 3


@pytest.mark.parametrize(
    "settings", [{"max_examples": 0}, {"max_update_norm": -1.0}, {"median_factor": float("nan")}, {"too_large": "keep"}]
)
def test_limits_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Limits(**settings)


def test_a_client_checks_the_state_it_receives():
    state = random_state(0)
    assert equal(read_state(packed(state), SHAPES), state)
    with pytest.raises(Rejected, match="orthonormal"):
        read_state(packed(state), SHAPES, orthonormal=True)
    state["a.lora_A"], state["a.lora_B"] = refactorize(state["a.lora_A"], state["a.lora_B"])
    state["b.c.lora_A"], state["b.c.lora_B"] = refactorize(state["b.c.lora_A"], state["b.c.lora_B"])
    assert equal(read_state(packed(state), SHAPES, orthonormal=True), state)
    with pytest.raises(Rejected, match="missing"):
        read_state(packed(random_state(0, "A")), SHAPES)
    with pytest.raises(Rejected, match=r"b\.c\.lora_B: a value of magnitude 2e\+07"):
        read_state(packed({**state, "b.c.lora_B": torch.full((5, R), -2e7)}), SHAPES)


# The strategy


def answering(answers) -> ClientApp:
    """Clients that send what `answers` has for them, by node: a reply, an exception to raise, or an error message."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context) -> Message:
        found = answers[context.node_id]
        if isinstance(found, Exception):
            raise found
        content = RecordDict({"arrays": ArrayRecord(dict(found.arrays)), "metrics": MetricRecord(dict(found.metrics))})
        return Message(content, reply_to=message)

    return app


def one_round(answers, strategy: FedSVDStrategy | None = None) -> FedSVDStrategy:
    strategy = strategy or FedSVDStrategy()
    with InProcessGrid(answering(answers), len(NODES)) as grid:
        strategy.start(grid, to_record(random_state(0)), num_rounds=1)
    return strategy


def test_a_round_averages_and_refactorises():
    strategy = one_round({node: reply(node, examples=10 * node) for node in NODES})
    before = random_state(0)
    weights = np.array(NODES) / sum(NODES)
    for name in ("a", "b.c"):
        products = [
            reply(node).arrays[f"{name}.lora_B"].numpy().astype(float) @ before[f"{name}.lora_A"].double().numpy()
            for node in NODES
        ]
        wanted = np.tensordot(weights, np.stack(products), 1)
        A, B = (strategy.state[f"{name}.lora_{f}"].double() for f in "AB")
        assert np.abs((B @ A).numpy() - wanted).max() < 1e-6 * np.abs(wanted).max()
        assert (A @ A.T - torch.eye(R)).abs().max() < 1e-6
        top = np.linalg.svd(wanted, compute_uv=False)[:R]
        assert np.allclose(strategy.singular_values[name], top, rtol=1e-5)
    assert strategy.audit == [] and strategy.refactorized


@pytest.mark.parametrize("row", [row for row in BAD if row not in ("bool examples", "10**400 examples")])
def test_a_round_with_a_bad_client_equals_the_round_without(row):
    spoil, _ = BAD[row]
    answers = {node: reply(node, examples=10 * node) for node in NODES}
    bad = spoil(answers[3])
    strategy = one_round({**answers, 3: RuntimeError(bad.error) if bad.error else bad})
    (entry,) = strategy.audit
    assert (entry.round, entry.node) == (1, 3)
    alone = one_round({**answers, 3: RuntimeError("left out")})
    assert equal(strategy.state, alone.state)
    assert all(torch.isfinite(value).all() for value in strategy.state.values())


@pytest.mark.parametrize("fault", ["in time", "a stranger", "twice", "too late"])
def test_a_round_with_replies_too_many_or_too_few(fault):
    answers = {node: reply(node, examples=10 * node) for node in (2, 3, 4, 5)}
    states = []
    for tampered in (True, False):
        strategy = FedSVDStrategy(clients_per_round=3)
        with InProcessGrid(answering(answers), 4) as grid:
            send = grid.send_and_receive

            def deliver(messages, timeout=None, send=send, strategy=strategy, tampered=tampered):
                messages = list(messages)
                if not messages:  # nobody evaluates
                    return []
                (other,) = set(answers) - set(strategy._asked)
                found = send(messages)
                if fault == "too late":
                    return found[1:]
                more = {"a stranger": [Message(messages[0].content, other, "train")], "twice": messages[:1]}
                return found + send(more.get(fault, []) if tampered else [])

            grid.send_and_receive = deliver
            strategy.start(grid, to_record(random_state(0)), num_rounds=1)
        states.append(strategy.state)
        first = strategy._asked[0]
        if fault == "too late":  # as if that node had failed
            answers[first] = RuntimeError("slow")
            assert strategy.audit == [AuditEntry(1, first, "no reply in time")]
        elif tampered and fault != "in time":
            (entry,) = strategy.audit
            assert entry.node == (first if fault == "twice" else (set(answers) - set(strategy._asked)).pop())
        else:
            assert strategy.audit == []
    assert equal(*states)


def test_a_strategy_goes_on_from_its_own_state_only():
    """It averages B with its own A: replies to another A would be products that nobody computed."""
    answers = {node: reply(node) for node in NODES}
    strategy = one_round(answers)
    state = dict(strategy.state)
    with pytest.raises(ValueError, match="goes on from round 1"):
        one_round(answers, strategy)
    assert equal(strategy.state, state)
    with InProcessGrid(answering(answers), len(NODES)) as grid:
        strategy.start(grid, to_record(strategy.sent()), num_rounds=1)
    assert strategy.round == 2


def test_replies_in_any_order_give_the_same_bits():
    states = []
    for order in ((2, 3, 4), (4, 2, 3)):
        strategy = FedSVDStrategy()
        with InProcessGrid(answering({node: reply(node, 7 * node) for node in NODES}), 3) as grid:
            receive_all = grid.send_and_receive
            grid.send_and_receive = lambda messages, timeout=None, order=order, send=receive_all: sorted(
                send(messages, timeout=timeout), key=lambda m: order.index(m.metadata.src_node_id)
            )
            strategy.start(grid, to_record(random_state(0)), num_rounds=1)
        states.append(strategy.state)
    assert equal(*states)


def test_fewer_valid_replies_than_min_valid_raise_and_leave_the_state():
    answers = {2: reply(2), 3: RuntimeError("out of memory"), 4: with_examples(0, reply(4))}
    strategy = FedSVDStrategy(min_valid=2)
    with pytest.raises(AggregationError, match=r"1 of 3 replies are valid.*min_valid=2.*out of memory.*num-examples"):
        one_round(answers, strategy)
    assert equal(strategy.state, random_state(0)) and len(strategy.audit) == 2
    assert one_round(answers).round == 1  # the default asks for one


def test_an_average_that_is_not_finite_is_not_taken():
    huge = {node: values(reply(node), lambda v: np.full_like(v, 3e38)) for node in NODES}
    strategy = FedSVDStrategy()
    with pytest.raises(AggregationError, match="round 1"):
        one_round(huge, strategy)
    assert equal(strategy.state, random_state(0))


def test_period_and_warm_up():
    rounds = []
    strategy = FedSVDStrategy(refactorize_every=2, refactorize_warmup=3)
    with InProcessGrid(answering({node: reply(node) for node in NODES}), 3) as grid:
        state = random_state(0)
        for number in range(1, 9):
            before = strategy.state.get("a.lora_A", state["a.lora_A"])
            messages = strategy.configure_train(number, to_record(strategy.state or state), ConfigRecord(), grid)
            strategy.aggregate_train(number, grid.send_and_receive(messages))
            if not torch.equal(strategy.state["a.lora_A"], before):
                rounds.append(number)
    assert rounds == [4, 6, 8]


def test_period_zero_is_ffa_lora():
    answers = {node: reply(node) for node in NODES}
    never, ffa = one_round(answers, FedSVDStrategy(refactorize_every=0)), one_round(answers, FedSVDStrategy("ffa-lora"))
    assert equal(never.state, ffa.state) and not ffa.refactorized
    assert all(torch.equal(ffa.state[name], value) for name, value in random_state(0, "A").items())


def both(node: int, *, own_A: bool) -> Reply:
    """A client that sends A and B; its A is the server's unless `own_A`."""
    sent = {name: value + 0.1 * random_state(node)[name] for name, value in random_state(0).items()}
    if not own_A:
        sent |= random_state(0, "A")
    return Reply(node, packed(sent), {"num-examples": 10 * node})


def products(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double() for name in ("a", "b.c")}


@pytest.mark.parametrize("own_A", [False, True])
@pytest.mark.parametrize("method", ["fedit", "flexlora", "fedex-lora"])
def test_methods_compared_with(method, own_A):
    """Where clients leave A alone all methods average the products exactly; where they do not, as each one says."""
    answers = {node: both(node, own_A=own_A) for node in NODES}
    strategy = one_round(answers, FedSVDStrategy(method))
    sent = [{name: torch.from_numpy(array.numpy()) for name, array in one.arrays.items()} for one in answers.values()]
    found = products(strategy.state)
    for name in found:
        exact = sum(node * products(state)[name] for node, state in zip(NODES, sent, strict=True)) / sum(NODES)
        mean_B, mean_A = (
            sum(node * state[f"{name}.lora_{f}"].double() for node, state in zip(NODES, sent, strict=True)) / sum(NODES)
            for f in "BA"
        )
        separate = mean_B @ mean_A
        U, S, Vh = torch.linalg.svd(exact)
        best = (U[:, :R] * S[:R]) @ Vh[:R]
        wanted = {"fedit": separate, "flexlora": best, "fedex-lora": exact}[method]
        if method == "fedex-lora":
            residual = strategy.residual
            found[name] = (
                found[name] + residual[f"{name}.residual_B"].double() @ residual[f"{name}.residual_A"].double()
            )
        assert (found[name] - wanted).abs().max() < 1e-6
        assert ((separate - exact).abs().max() > 1e-3) == own_A
    assert strategy.audit == []


def test_clients_are_drawn_by_seed_and_round_and_not_by_the_global_generator():
    import random

    drawn = {}
    for seed in (0, 0, 1):
        strategy = FedSVDStrategy(clients_per_round=3, seed=seed)
        with InProcessGrid(answering({}), 6) as grid:
            state = random.getstate()
            rounds = [
                sorted(
                    m.metadata.dst_node_id for m in strategy.configure_train(n, to_record(ORIGIN), ConfigRecord(), grid)
                )
                for n in range(1, 9)
            ]
            assert random.getstate() == state
        assert all(len(set(nodes)) == 3 for nodes in rounds)
        drawn.setdefault(seed, []).append(rounds)
    assert drawn[0][0] == drawn[0][1] != drawn[1][0]
    assert len({tuple(nodes) for nodes in drawn[0][0]}) > 2


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"method": "fedavg"}, "fedavg"),
        ({"method": "ffa-lora", "refactorize_every": 2}, "refactorize_every"),
        ({"private": True, "weighting": "examples"}, "uniform"),
        ({"weighting": "median"}, "weighting"),
        ({"min_valid": 0}, "min_valid"),
        ({"clients_per_round": 2, "min_valid": 3}, "min_valid"),
        ({"refactorize_every": -1}, "refactorize_every"),
        ({"refactorize_warmup": -1}, "refactorize_warmup"),
        ({"private": True, "evaluate_clients": True}, "not noised"),
    ],
)
def test_settings_that_contradict_each_other(settings, word):
    with pytest.raises(ValueError, match=word):
        FedSVDStrategy(**settings)


def test_resuming_a_checkpoint_equals_going_on(tmp_path):
    answers = {2: reply(2), 3: RuntimeError("gone"), 4: reply(4)}
    whole = FedSVDStrategy(refactorize_every=2)
    half = FedSVDStrategy(refactorize_every=2, checkpoints=tmp_path)
    with InProcessGrid(answering(answers), 3) as grid:
        whole.start(grid, to_record(random_state(0)), num_rounds=4)
        half.start(grid, to_record(random_state(0)), num_rounds=3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["state-3.safetensors", "strategy.json"]
        again = FedSVDStrategy(refactorize_every=2)
        again.start(grid, again.resume(tmp_path), num_rounds=1)
    assert equal(whole.state, again.state) and whole.audit == again.audit and again.round == 4
    with pytest.raises(ValueError, match="ffa-lora"):
        FedSVDStrategy("ffa-lora").resume(tmp_path)
    (tmp_path / "state-3.safetensors").write_bytes(b"\xff" * 40)
    fresh = FedSVDStrategy()
    with pytest.raises(ValueError, match="no checkpoint"):
        fresh.resume(tmp_path)
    assert fresh.round == 0 and not fresh.state


# The grid


def test_the_grid_keeps_state_turns_exceptions_into_errors_and_leaves_no_identity():
    app = ClientApp()

    @app.train()
    def train(message, context):
        seen = context.state.config_records.get("seen", ConfigRecord({"times": 0}))
        context.state["seen"] = ConfigRecord({"times": seen["times"] + 1})
        message.content["config"]["server-round"] = -1  # its own copy
        context.run_config["lr"] = -1
        if context.node_config["partition-id"] == 1:
            raise ValueError("no data here")
        return Message(RecordDict({"metrics": MetricRecord({"times": seen["times"]})}), reply_to=message)

    before = [getattr(TaskIdentity, name) for name in ("_node_id", "_run_id", "_task_id")]
    with InProcessGrid(app, 2, run_config={"lr": 1.0}) as grid:
        content = RecordDict({"config": ConfigRecord({"server-round": 1})})
        for times in range(2):
            first, second = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
            assert first.content["metrics"]["times"] == times and first.metadata.src_node_id == 2
            assert second.has_error() and "no data here" in second.error.reason
        assert content["config"]["server-round"] == 1 and grid.run_config == {"lr": 1.0}
        (unknown,) = grid.send_and_receive([Message(content, 99, "train")])
        assert unknown.has_error() and "99" in unknown.error.reason
        assert grid.send_and_receive([Message(content, 2, "train")], timeout=0) == []  # too late
    assert [getattr(TaskIdentity, name) for name in ("_node_id", "_run_id", "_task_id")] == before
    with InProcessGrid(app, 2, contexts=grid.contexts) as later:
        with pytest.raises(RuntimeError, match="open already"):
            later.__enter__()
        (reply,) = later.send_and_receive([Message(content, 2, "train")])
        assert reply.content["metrics"]["times"] == 2
    with pytest.raises(RuntimeError, match="with InProcessGrid"):
        grid.get_node_ids()


# Clients, servers, and both

SETTINGS = LocalSettings(steps=3, batch_size=8, learning_rate=0.5, seed=1)


def model_of(context=None, config=peftx.FedSVDConfig, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"r": R, "lora_alpha": R, "target_modules": ["query", "value"], **settings}
    return get_peft_model(tiny_model("bert"), config(**settings))


def rows(place: int, size: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(place)
    ids = torch.randint(1, 64, (size, 6), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.sum() % 3} for row in ids]


def data_of(context):
    return rows(context.node_config["partition-id"]), None


def accuracy_of(model, context) -> dict[str, float]:
    batch = rows(99)
    with torch.no_grad():
        logits = model(input_ids=torch.stack([row["input_ids"] for row in batch])).logits
    return {"logit": logits.abs().sum().item()}


def run(
    strategy: FedSVDStrategy, number: int, clients: int = 3, *, build=model_of, settings=None, contexts=None, **client
):
    """Both apps in this process: the strategy, Flower's result and the grid."""
    kept = {}
    server = make_server_app(
        build,
        strategy,
        num_rounds=number,
        evaluate=accuracy_of,
        on_end=lambda strategy, result: kept.update(result=result),
    )
    client_app = make_client_app(build, data_of, settings or SETTINGS, **client)
    grid = run_in_process(server, client_app, clients, contexts=contexts)
    return strategy, kept["result"], grid


def test_a_client_sends_lora_B_only_and_leaves_everything_else_alone():
    sent = {}
    app = make_client_app(model_of, data_of, SETTINGS)
    state = global_state(model_of())
    with InProcessGrid(app, 1) as grid:
        strategy = FedSVDStrategy()
        messages = strategy.configure_train(1, to_record(state), ConfigRecord(), grid)
        (answer,) = grid.send_and_receive(messages)
    (record,) = answer.content.array_records.values()
    sent = {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    assert sent.keys() == {name for name in state if name.endswith(".lora_B")}
    assert any(value.abs().sum() > 0 for value in sent.values())
    size = sum(len(array.data) for array in record.values())
    assert size == sum(4 * value.numel() + 128 for value in sent.values())  # numpy's headers
    assert dict(answer.content["metrics"]).keys() == {"num-examples", "loss"}
    assert answer.content["metrics"]["num-examples"] == 24

    model = model_of()
    before = {name: p.clone() for name, p in model.named_parameters()}
    set_trainable(model, "B")
    train_local(model, rows(0), None, SETTINGS, round=1, node=0)
    assert equal(client_state(model), sent)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".lora_B." in name for name in changed)


def test_one_client_is_centralised_training_bit_for_bit():
    strategy, result, _ = run(FedSVDStrategy(), 3, clients=1)
    model = model_of()
    logits = [accuracy_of(model.eval(), None)["logit"]]
    for number in (1, 2, 3):
        set_trainable(model, "B")
        train_local(model, rows(0), None, SETTINGS, round=number, node=0)
        refactorize_model(model)
        logits.append(accuracy_of(model.eval(), None)["logit"])
    assert equal(strategy.state, global_state(model))
    assert [result.evaluate_metrics_serverapp[number]["logit"] for number in range(4)] == logits
    assert len(set(logits)) == 4


def test_metrics_checkpoint_and_report(tmp_path):
    server = make_server_app(model_of, lambda context: FedSVDStrategy(), evaluate=accuracy_of)
    client = make_client_app(model_of, data_of, SETTINGS, evaluate=accuracy_of)
    run_in_process(server, client, 2, run_config={"rounds": 2, "output": str(tmp_path)})
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["method"] == "fedsvd" and set(found["server"]) == {"0", "1", "2"} and found["audit"] == []
    assert found["train"]["1"].keys() == {"admitted", "dropped", "loss"}
    model = model_of()
    strategy = FedSVDStrategy()
    receive(model, strategy.resume(tmp_path), "default", orthonormal=True)
    assert accuracy_of(model.eval(), None)["logit"] == found["server"]["2"]["logit"]


def test_evaluation_by_clients():
    _, result, _ = run(FedSVDStrategy(evaluate_clients=True), 1, clients=2, evaluate=accuracy_of)
    server, clients = (r[1]["logit"] for r in (result.evaluate_metrics_serverapp, result.evaluate_metrics_clientapp))
    assert clients == pytest.approx(server, rel=1e-6)
    with pytest.raises(ValueError, match="not noised"):
        make_client_app(model_of, data_of, SETTINGS, evaluate=accuracy_of, privacy=DPSpec(noise_multiplier=1.0))


def test_a_client_that_fails_is_audited_and_the_rest_go_on():
    def data(context):
        if context.node_config["partition-id"] == 1:
            raise FileNotFoundError("the disk is gone")
        return data_of(context)

    strategy = FedSVDStrategy()
    server = make_server_app(model_of, strategy, num_rounds=1)
    run_in_process(server, make_client_app(model_of, data, SETTINGS), 3)
    assert strategy.audit == [AuditEntry(1, 3, strategy.audit[0].reason)]
    assert "the disk is gone" in strategy.audit[0].reason and strategy.round == 1


def test_a_client_refuses_a_server_that_asks_for_A_or_sends_nonsense():
    strategy = FedSVDStrategy("fedit")
    with pytest.raises(AggregationError, match="asks for the factors 'AB'"):
        run(strategy, 1, clients=1)
    model = model_of()
    before = global_state(model)
    state = {**before, next(iter(before)): torch.full_like(next(iter(before.values())), torch.nan)}
    with pytest.raises(Rejected, match="NaN"):
        receive(model, packed(state), "default")
    with pytest.raises(Rejected, match="orthonormal"):
        receive(model, packed(before), "default", orthonormal=True)
    with pytest.raises(Rejected, match="missing"):
        receive(model, packed(client_state(model)), "default")
    assert equal(global_state(model), before)


def test_clients_of_fedsvd_keep_their_base_weights():
    """Residuals are FedEx-LoRA's: a server could write what it likes by them."""
    model = model_of()
    state = global_state(model)
    name = next(iter(state)).rpartition(".")[0]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    residual = {f"{name}.residual_{f}": torch.ones_like(state[f"{name}.lora_{f}"]) for f in "AB"}
    with pytest.raises(Rejected, match="unexpected arrays.*residual"):
        receive(model, packed({**state, **residual}), "default", factors="B")
    with pytest.raises(Rejected, match="without its other factor"):
        receive(model, packed({**state, f"{name}.residual_B": residual[f"{name}.residual_B"]}), "default")
    assert equal(model.state_dict(), weights)
    app = make_client_app(model_of, data_of, SETTINGS)
    strategy = FedSVDStrategy()
    strategy.residual = residual
    with InProcessGrid(app, 1) as grid:
        strategy.state = state
        (answer,) = grid.send_and_receive(
            strategy.configure_train(1, to_record(strategy.sent()), ConfigRecord(), grid), timeout=60
        )
    assert answer.has_error() and "residual" in answer.error.reason


def test_only_what_is_sent_trains():
    model = model_of()
    model.add_adapter("other", model.peft_config["default"])
    set_trainable(model, "B")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(name.endswith(".lora_B.default.weight") for name in names)
    with pytest.raises(ValueError, match="never trains.*LoraConfig"):  # else it would, silently, be FFA-LoRA
        set_trainable(model, "AB")


@pytest.mark.parametrize("given", [{}, {"refactorize_every": 3}, {"refactorize_warmup": 3}])
def test_the_adapters_config_says_when_unless_the_strategy_does(given):
    build = partial(model_of, config=partial(peftx.FedSVDConfig, refactorize_every=2, refactorize_warmup=1))
    turned = []

    class Watched(FedSVDStrategy):
        def _update(self, admitted, number):
            before = self.state
            super()._update(admitted, number)
            turned.extend(
                [number] * (not equal(*({n: v for n, v in s.items() if n[-1] == "A"} for s in (before, self.state))))
            )

    run(Watched(**given), 4, clients=1, build=build)
    assert turned == {"": [2, 4], "refactorize_every": [3], "refactorize_warmup": [4]}["".join(given)]


@pytest.mark.parametrize("method", ["fedit", "flexlora", "fedex-lora"])
def test_methods_that_train_both_factors_run(method):
    lora = partial(model_of, config=LoraConfig)
    settings = replace(SETTINGS, optimizer="adamw", learning_rate=1e-2)
    strategy, result, _ = run(FedSVDStrategy(method), 3, build=lora, factors="AB", settings=settings)
    assert strategy.audit == [] and strategy.round == 3
    if method == "fedex-lora":
        model = lora()
        receive(model, packed(strategy.sent()), "default")
        bare = lora()
        load_global(bare, strategy.state)
        weights = [{n: p for n, p in m.state_dict().items() if "lora_" not in n} for m in (model, bare)]
        assert not equal(*weights)
        layers = {name.rpartition(".")[0] for name in strategy.residual}
        fold(bare, {n: (strategy.residual[f"{n}.residual_B"], strategy.residual[f"{n}.residual_A"]) for n in layers})
        assert equal(*weights)
        assert result.evaluate_metrics_serverapp[3]["logit"] == accuracy_of(model.eval(), None)["logit"]
        side = min(strategy.state[f"{n}.lora_B"].shape[0] for n in layers)
        assert all(len(strategy.residual[f"{n}.residual_A"]) <= side for n in layers)


# Privacy

PRIVATE = DPSpec(noise_multiplier=1.0, delta=1e-3, accountant="rdp", noise_seed=0)


def test_a_private_client_withholds_numbers_and_keeps_its_accountant():
    strategy, result, grid = run(FedSVDStrategy(private=True), 3, clients=2, privacy=PRIVATE)
    assert strategy.audit == [] and "loss" not in result.train_metrics_clientapp[1]
    for context in grid.contexts.values():
        history = load_history(context)
        assert history == [[1.0, 1 / 3, 9]]  # 24 records, 8 a step, 3 steps a round
        assert context.state["privacy"]["epsilon"] == pytest.approx(epsilon_spent([(1.0, 1 / 3, 9)], 1e-3, "rdp"))
    # The accountant goes on after a restart as if there had been none.
    _, _, again = run(FedSVDStrategy(private=True), 2, clients=2, privacy=PRIVATE, contexts=grid.contexts)
    assert load_history(again.contexts[2]) == [[1.0, 1 / 3, 15]]


def test_replies_without_numbers_need_uniform_weights():
    with pytest.raises(AggregationError, match="num-examples"):
        run(FedSVDStrategy(), 1, clients=1, privacy=PRIVATE)


def test_a_round_over_the_budget_is_refused_and_audited():
    spec = DPSpec(epsilon=8.0, delta=1e-3, accountant="rdp", noise_seed=0)
    strategy, _, grid = run(FedSVDStrategy(private=True), 2, clients=2, privacy=spec, rounds=2)
    spent = grid.contexts[2].state["privacy"]["epsilon"]
    assert 7.9 < spent <= 8.0 and strategy.audit == []
    kept = load_history(grid.contexts[2])
    late = FedSVDStrategy(private=True)
    with pytest.raises(AggregationError, match="budget"):
        run(late, 1, clients=2, privacy=spec, rounds=2, contexts=grid.contexts)
    assert [entry.node for entry in late.audit] == [2, 3] and all("budget" in entry.reason for entry in late.audit)
    assert "epsilon" not in late.audit[0].reason  # what was spent stays with the client
    assert load_history(grid.contexts[2]) == kept
    # One client at its limit does not stop the other.
    fresh = {3: InProcessGrid(ClientApp(), 2).contexts[3]}
    mixed, _, _ = run(
        FedSVDStrategy(private=True), 1, clients=2, privacy=spec, rounds=2, contexts={**grid.contexts, **fresh}
    )
    assert [entry.node for entry in mixed.audit] == [2] and mixed.round == 1


def test_errors_of_a_private_client_tell_nothing():
    """They would name records, or count them: here delta is above 1 / 24."""
    spec = DPSpec(noise_multiplier=1.0, delta=0.5, accountant="rdp")
    strategy = FedSVDStrategy(private=True)
    with pytest.raises(AggregationError):
        run(strategy, 1, clients=1, privacy=spec)
    assert strategy.audit == [AuditEntry(1, 2, "the client failed: an error that its own log tells")]


def test_a_ledger_outlives_runs_and_restarts(tmp_path):
    """Flower's state of a node is in memory and belongs to one run."""
    ledger = lambda context: tmp_path / f"{context.node_config['partition-id']}.json"
    for rounds in (2, 3):  # new contexts each time
        _, _, grid = run(FedSVDStrategy(private=True), rounds, clients=2, privacy=PRIVATE, ledger=ledger)
    assert load_history(grid.contexts[2]) == [[1.0, 1 / 3, 15]]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["0.json", "1.json"]
    known = json.loads((tmp_path / "1.json").read_text())
    assert known == {"history": [[1.0, 1 / 3, 15]], "epsilon": grid.contexts[3].state["privacy"]["epsilon"]}
    before = (tmp_path / "0.json").read_bytes()
    spec = DPSpec(epsilon=known["epsilon"] * 0.9, delta=1e-3, accountant="rdp")
    with pytest.raises(AggregationError, match="budget"):
        run(FedSVDStrategy(private=True), 1, clients=1, privacy=spec, ledger=tmp_path / "0.json")
    (tmp_path / "1.json").write_text("{")
    with pytest.raises(AggregationError, match="its own log tells"):  # rather than begin anew
        run(FedSVDStrategy(private=True), 1, clients=1, privacy=PRIVATE, ledger=tmp_path / "1.json")
    assert (tmp_path / "0.json").read_bytes() == before
    with pytest.raises(ValueError, match="ledger"):
        make_client_app(model_of, data_of, SETTINGS, ledger=tmp_path / "0.json")


def test_the_history_survives_json():
    context = SimpleNamespace(state=RecordDict())
    assert load_history(context) is None
    keep_history(context, [[0.7310585786300049, 1 / 3, 17]], 1.25)
    assert load_history(context) == [[0.7310585786300049, 1 / 3, 17]]
    assert context.state["privacy"]["epsilon"] == 1.25


def test_private_clients_draw_noise_of_their_own():
    """Two clients with the same data and a known noise seed must not send the same noise."""
    app = make_client_app(model_of, lambda context: (rows(0), None), SETTINGS, privacy=PRIVATE)
    with InProcessGrid(app, 2) as grid:
        strategy = FedSVDStrategy(private=True)
        messages = strategy.configure_train(1, to_record(global_state(model_of())), ConfigRecord(), grid)
        first, second = (next(iter(m.content["arrays"].values())).numpy() for m in grid.send_and_receive(messages))
    assert np.abs(first - second).max() > 1e-3


def test_dirichlet_partition():
    labels = [i % 3 for i in range(600)]
    parts = dirichlet_partition(labels, 6, 0.5, seed=1, min_size=20)
    assert sorted(i for part in parts for i in part) == list(range(600)) and min(map(len, parts)) >= 20
    assert parts == dirichlet_partition(labels, 6, 0.5, seed=1, min_size=20)
    assert parts != dirichlet_partition(labels, 6, 0.5, seed=2, min_size=20)
    shares = [sum(labels[i] == 0 for i in part) / len(part) for part in parts]
    even = [sum(labels[i] == 0 for i in part) / len(part) for part in dirichlet_partition(labels, 6, 1e4)]
    assert max(shares) - min(shares) > 0.3 and max(even) - min(even) < 0.1
    for clients, alpha, size in ((0, 0.5, 1), (6, 0.0, 1), (6, 0.5, 101), (300, 1e-3, 2)):
        with pytest.raises(ValueError):
            dirichlet_partition(labels, clients, alpha, min_size=size)


# The packaging


def test_without_flower_the_message_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("flwr", "peftx.federated."))]:
        if name.startswith("flwr") or name.rpartition(".")[2] in ("flower", "strategy", "grid", "apps"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    for name in ("FedSVDStrategy", "InProcessGrid", "make_client_app", "make_server_app"):
        with pytest.raises(ImportError, match=r"pip install .peftx\[federated\]"):
            getattr(peftx.federated, name)
    assert peftx.federated.admit is admit  # needs no engine


def test_every_public_name_is_there():
    assert all(getattr(peftx.federated, name) is not None for name in peftx.federated.__all__)
    assert set(peftx.federated._NAMES) < set(peftx.federated.__all__)
    assert {"LocalSettings", "Limits", "BudgetExceeded", "run_in_process"} < set(peftx.federated.__all__)


def test_flower_is_imported_late_and_sends_nothing():
    code = (
        "import sys, peftx.federated; assert 'flwr' not in sys.modules and 'opacus' not in sys.modules;"
        "peftx.federated.InProcessGrid; from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "0", found.stderr


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES / "federated"))
    import in_process

    in_process.main(["--rounds", "2"])
    assert "round 2" in capsys.readouterr().out


def test_in_the_example_a_node_sets_its_own_epsilon(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES / "federated"))
    from fedsvd_app import client_app, task

    config = {"method": "fedsvd", "clients": 2, "epsilon": 0.0, "rounds": 1}
    with InProcessGrid(client_app.app, 2, run_config=config) as grid:
        grid.contexts[2].node_config.update(epsilon=8.0, ledger=str(tmp_path / "spent.json"))
        state = global_state(task.build_model(SimpleNamespace(run_config=config)))
        strategy = FedSVDStrategy()
        messages = strategy.configure_train(1, to_record(state), ConfigRecord(), grid)
        private, plain = (dict(found.content["metrics"]) for found in grid.send_and_receive(messages))
    assert private == {} and plain.keys() == {"num-examples", "loss"}
    assert 7.9 < json.loads((tmp_path / "spent.json").read_text())["epsilon"] <= 8.0
