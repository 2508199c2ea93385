"""The server's side of FedSVD (arXiv:2505.12805) and of what it is compared with, as a Flower strategy."""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..tuners.fedsvd import is_due
from .checkpoint import Checkpoint, read, write
from .checks import (
    WEIGHT_CAP,
    Admitted,
    AuditEntry,
    Limits,
    admit,
    check_count,
    check_factor,
    check_state,
    read_state,
)
from .evaluation import average_metrics
from .flower import (
    AggregationError,
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
    Result,
    Strategy,
)
from .messages import ARRAYS, CONFIG, to_metrics, to_record, to_reply
from .state import average_AB, average_B, fedex_lora, flexlora, joined, refactorize_state

METHODS = {"fedsvd": "B", "ffa-lora": "B", "fedit": "AB", "flexlora": "AB", "fedex-lora": "AB"}
"""What clients train and send, by method."""

log = getLogger("flwr").log


class FedSVDStrategy(Strategy):
    """Rounds of local training on B, exact averages, and an A that the server turns into their singular basis.

    Each round: A and B go to some clients; what comes back is admitted or dropped one by one (`checks.admit`); the
    average of the rest becomes B; where a refactorisation is due, A' and B' with B' A' = B A and orthonormal A' replace
    both. A node's reply counts once, in the order of node ids, so that the result does not depend on who was first. A
    round without a misbehaving client gives, bit for bit, what that round gives with that client dropped.

    The other methods are for comparison: "ffa-lora" never refactorises; "fedit" has clients train A and B and averages
    each; "flexlora" averages their products and truncates; "fedex-lora" averages as FedIT and sends down, for the
    clients' base weights, what the average of the products has beyond that.

    Args:
        method: see `METHODS`.
        refactorize_every, refactorize_warmup: as in `peftx.FedSVDConfig`. Default for FedSVD: what the adapter's config
            says where `make_server_app` runs the rounds (see `follow`), else 1 and 0.
        clients_per_round: how many are asked, drawn by `seed` and round. Default: all that are connected.
        min_nodes: how many must be connected before a round starts; at least `clients_per_round`. Default 1.
        min_valid: a round with fewer admitted replies is skipped: the state stays. Default 1.
        max_failed_rounds: rounds in a row that may be skipped; one more ends the run with an error, as does a run
            without any other round. Default 3.
        weighting: "examples": by the clients' numbers of examples (McMahan et al., the reference's default).
            "uniform": all equal. Default: "examples", or "uniform" where `private`.
        weight_cap: a client's number of examples counts as at most so many times the median of the other clients' (see
            `checks.capped`), in the average and in the means of metrics; the audit has "capped" entries. Default 10,
            which ordinary imbalance stays below. None: what a client says counts, up to `Limits.max_examples`.
        private: clients train with differential privacy. They then withhold the number of their examples and their
            loss, which are not noised; so `weighting` must be "uniform".
        limits: what one client may say; see `Limits`.
        seed: draws the clients. The global random state is left alone.
        checkpoints: a folder; if given, `checkpoint` writes there after every round.
        evaluate_clients: ask all nodes for an evaluation of the new state after each round. Default False.
        connect_timeout: seconds to wait for `min_nodes`.

    Attributes:
        audit: an `AuditEntry` for every reply that was dropped, clipped, capped or missing.
        skipped: why, by the number of each round that was skipped.
        result: Flower's `Result` of the last `start`, as far as it has come: there also when the run ends in an error.
        state: by name, the factors that go out next, fp32.
        singular_values: those of the last refactorisation, by layer, without the LoRA scale.

    Raises:
        ValueError: settings that contradict each other.
    """

    def __init__(
        self,
        method: Literal["fedsvd", "ffa-lora", "fedit", "flexlora", "fedex-lora"] = "fedsvd",
        *,
        refactorize_every: int | None = None,
        refactorize_warmup: int | None = None,
        clients_per_round: int | None = None,
        min_nodes: int = 1,
        min_valid: int = 1,
        max_failed_rounds: int = 3,
        weighting: Literal["examples", "uniform"] | None = None,
        weight_cap: float | None = WEIGHT_CAP,
        private: bool = False,
        limits: Limits | None = None,
        seed: int = 0,
        checkpoints: str | Path | None = None,
        evaluate_clients: bool = False,
        connect_timeout: float = 600.0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}")
        if method != "fedsvd" and refactorize_every:
            raise ValueError(f"refactorize_every={refactorize_every} belongs to fedsvd; {method} never refactorises")
        for name, value in (("refactorize_every", refactorize_every), ("refactorize_warmup", refactorize_warmup)):
            if value is not None:
                check_count(name, value, 0)
        if private and evaluate_clients:
            raise ValueError("private clients do not evaluate, since metrics are not noised: no evaluate_clients")
        if private and weighting == "examples":
            raise ValueError('private clients withhold the number of their examples: use weighting="uniform"')
        if weighting not in (None, "examples", "uniform"):
            raise ValueError(f'weighting must be "examples" or "uniform", got {weighting!r}')
        for name, value in (("min_valid", min_valid), ("min_nodes", min_nodes)):
            check_count(name, value)
        check_count("max_failed_rounds", max_failed_rounds, 0)
        check_factor("weight_cap", weight_cap)
        if clients_per_round is not None:
            check_count("clients_per_round", clients_per_round)
        if clients_per_round is not None and clients_per_round < min_valid:
            raise ValueError(f"clients_per_round={clients_per_round} can never give min_valid={min_valid} replies")
        self.method = method
        self.factors = METHODS[method]
        self.refactorize_every = refactorize_every
        self.refactorize_warmup = refactorize_warmup
        self.clients_per_round = clients_per_round
        self.min_nodes = max(min_nodes, clients_per_round or 1)
        self.min_valid = min_valid
        self.max_failed_rounds = max_failed_rounds
        self.weight_cap = weight_cap
        self.private = private
        self.weighting: Literal["examples", "uniform"] = weighting or ("uniform" if private else "examples")
        self.limits = limits or Limits()
        self.seed = seed
        self.checkpoints = None if checkpoints is None else Path(checkpoints)
        self.evaluate_clients = evaluate_clients
        self.connect_timeout = connect_timeout

        self.audit: list[AuditEntry] = []
        self.state: dict[str, Tensor] = {}
        self.residual: dict[str, Tensor] = {}
        self.singular_values: dict[str, Tensor] = {}
        self.refactorized = False
        self.skipped: dict[int, str] = {}
        self.result = Result()
        self.round = 0  # rounds so far, those that were skipped too
        self._first = self._last = 0  # rounds before this `start`, and after it
        self._failed = 0  # rounds in a row
        self._asked: list[int] = []

    def summary(self) -> None:
        log(INFO, "\t├── %s, clients send %s", self.method, " and ".join(f"lora_{f}" for f in self.factors))
        log(INFO, "\t└── average by %s, at least %d valid replies", self.weighting, self.min_valid)

    def follow(self, config: Any) -> None:
        """Takes from an adapter's config when to refactorise, as far as it says so and this strategy was not told."""
        for name in ("refactorize_every", "refactorize_warmup"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(config, name, None))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Flower's loop; see `flwr.serverapp.strategy.Strategy.start`. After `resume` its rounds count on.

        Raises:
            ValueError: the strategy holds another state than `initial_arrays`, of rounds before or a checkpoint; or
                clients would refuse it.
            AggregationError: more than `max_failed_rounds` rounds in a row failed, or all of them. What there was
                before is in `state`, `result` and `audit`.
        """
        if self.state and dict(initial_arrays) != dict(to_record(self.sent())):
            raise ValueError(
                f"this strategy goes on from round {self.round}, with `to_record(strategy.sent())`: start from other "
                "arrays with a new one"
            )
        if not self.state:
            self._load(initial_arrays)
        self._first, self._last = self.round, self.round + num_rounds
        self._failed, self.result = 0, Result()

        def evaluated(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            found = None if evaluate_fn is None else evaluate_fn(number, arrays)
            if found is not None:
                self.result.evaluate_metrics_serverapp[number] = found
            return found

        loop = (num_rounds, timeout, train_config, evaluate_config, None if evaluate_fn is None else evaluated)
        result = super().start(grid, initial_arrays, *loop)
        if self._failed and self._failed == num_rounds:
            raise AggregationError(f"no round succeeded; the last one, {self.skipped[self.round]}")
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        number = self._first + server_round
        if not self.state:
            self._load(arrays)
        self._asked = []
        nodes = self._connected(grid)
        if len(nodes) < self.min_nodes:
            return []  # a round without replies
        wanted = self.clients_per_round or len(nodes)
        self._asked = sorted(random.Random(f"{self.seed}, round {number}").sample(nodes, wanted))
        said = {
            "server-round": number,
            "method": self.method,
            "factors": self.factors,
            "refactorized": self.refactorized,
        }
        if self._last:
            said["rounds"] = self._last
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({**config, **said})})
        return [Message(content, node, MessageType.TRAIN, group_id=str(number)) for node in self._asked]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next state and the round's metrics: how many replies were "admitted" and "dropped", and their "loss".

        With fewer than `min_valid` admitted replies the round is skipped: no arrays, the state stays, and "skipped" is
        1 among the metrics. A reply that takes the state beyond what clients accept is dropped, the largest update
        first, as if it had not been admitted.

        Raises:
            AggregationError: more than `max_failed_rounds` rounds in a row were skipped.
        """
        number = self._first + server_round
        received, refused = [to_reply(message) for message in replies], dict[int, AuditEntry]()
        while True:
            admitted, entries = admit(
                (reply for reply in received if reply.node not in refused),
                self._origin(),
                asked=[node for node in self._asked if node not in refused],
                round=number,
                limits=self.limits,
                count_examples=self.weighting == "examples",
                weight_cap=self.weight_cap,
            )
            entries += refused.values()
            if len(admitted) < self.min_valid:
                break
            try:
                self._update(admitted, number)
                break
            except (ValueError, torch.linalg.LinAlgError) as error:
                worst = max(admitted, key=lambda one: one.norm)
                refused[worst.node] = AuditEntry(number, worst.node, f"clients would refuse the average: {error}"[:390])
        self.audit += entries
        for entry in entries:
            log(WARNING, "round %d, node %d: %s: %s", number, entry.node, entry.action, entry.reason)
        self.round = number
        dropped = sum(entry.action == "dropped" for entry in entries)
        metrics = MetricRecord({"admitted": len(admitted), "dropped": dropped})
        self.result.train_metrics_clientapp[server_round] = metrics
        failed = len(admitted) < self.min_valid
        if failed:
            metrics["skipped"] = 1
            self._skip(number, len(admitted), entries)
        else:
            self._failed = 0
            losses = [(one.examples, one.loss) for one in admitted if one.loss is not None]
            if losses and not self.private:
                metrics["loss"] = sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)
        if self.checkpoints is not None:
            self.checkpoint(self.checkpoints)
        if self._failed > self.max_failed_rounds:
            raise AggregationError(
                f"more than max_failed_rounds={self.max_failed_rounds} rounds in a row failed; the last one, "
                f"{self.skipped[number]}"
            )
        return None if failed else to_record(self.sent()), metrics

    def _skip(self, number: int, valid: int, entries: list[AuditEntry]) -> None:
        reason = (
            f"round {number}: {valid} of {len(self._asked)} replies are valid, fewer than min_valid={self.min_valid}"
        )
        if not self._asked:
            reason = f"round {number}: fewer than min_nodes={self.min_nodes} nodes are connected"
        reasons = [f"node {entry.node}: {entry.reason}" for entry in entries if entry.action == "dropped"]
        self.skipped[number] = ": ".join([reason, *(["; ".join(reasons)] if reasons else [])])
        self._failed += 1
        log(WARNING, "skipped %s", self.skipped[number])

    def _update(self, admitted: list[Admitted], number: int) -> None:
        """Takes over the average of the replies, refactorised where that is due.

        Raises:
            ValueError: clients would refuse it; the state stays.
        """
        parts = ((one.examples, one.tensors()) for one in admitted)
        state, residual, values = dict(self.state), self.residual, self.singular_values
        if self.factors == "B":
            state |= average_B(self.state, parts, weighting=self.weighting)
        elif self.method == "fedit":
            state = average_AB(self.state, parts, weighting=self.weighting)
        elif self.method == "flexlora":
            state = flexlora(self.state, parts, weighting=self.weighting)
        else:
            state, new = fedex_lora(self.state, parts, weighting=self.weighting)
            residual = joined(self.residual, new)
        due = self._is_due(number)
        if due:
            state, values = refactorize_state(state)
        check_state({**state, **residual}, orthonormal=self.refactorized or due)
        self.state, self.residual, self.singular_values = state, residual, values
        self.refactorized |= due

    def _is_due(self, number: int) -> bool:
        every = 1 if self.refactorize_every is None else self.refactorize_every
        return self.method == "fedsvd" and is_due(number, every, self.refactorize_warmup or 0)

    def sent(self) -> dict[str, Tensor]:
        """What clients receive: the factors, and FedEx-LoRA's residuals."""
        return {**self.state, **self.residual}

    def _origin(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state.items() if name[-1] in self.factors}

    def _load(self, arrays: ArrayRecord) -> None:
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        self._take(read_state(arrays, shapes, orthonormal=self.refactorized))

    def _take(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: value for name, value in state.items() if name.endswith((".lora_A", ".lora_B"))}
        self.residual = {name: value for name, value in state.items() if name not in self.state}

    def _connected(self, grid: Grid) -> list[int]:
        """The nodes, when there are `min_nodes` or it has taken `connect_timeout`."""
        end = time.monotonic() + self.connect_timeout
        while len(nodes := sorted(grid.get_node_ids())) < self.min_nodes:
            if time.monotonic() > end:
                log(WARNING, "%d nodes are connected, %d are needed: no longer waiting", len(nodes), self.min_nodes)
                break
            time.sleep(1)
        return nodes

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if not self.evaluate_clients:
            return []
        number = self._first + server_round
        self._asked = self._connected(grid)  # fewer than a round of training needs are enough
        said = {"server-round": number, "method": self.method, "refactorized": self.refactorized}
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({**config, **said})})
        return [Message(content, node, MessageType.EVALUATE, group_id=str(number)) for node in self._asked]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean of each metric, weighted by examples as the average is; see `evaluation.average_metrics`."""
        found, entries = average_metrics(
            map(to_metrics, replies),
            asked=self._asked,
            round=self._first + server_round,
            limits=self.limits,
            weight_cap=self.weight_cap,
        )
        self.audit += entries
        if not found:
            return None
        self.result.evaluate_metrics_clientapp[server_round] = record = MetricRecord(dict(found))
        return record

    def checkpoint(self, folder: str | Path) -> None:
        """Writes the global state (safetensors) and strategy.json; the old pair stays until the new one is whole."""
        write(Path(folder), Checkpoint(self.method, self.round, self.refactorized, self.sent(), self.audit))

    def resume(self, folder: str | Path) -> ArrayRecord:
        """Takes up a checkpoint: returns the arrays for `start`, whose rounds then count on from there.

        Raises:
            ValueError: no checkpoint of this method there, or a damaged one, or a state that clients would refuse; the
                strategy stays as it was.
        """
        found = read(Path(folder), self.method)
        self._take(found.state)
        self.audit, self.round, self.refactorized = found.audit, found.round, found.refactorized
        return to_record(found.state)
