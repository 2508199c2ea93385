"""The server's side of FedSVD (arXiv:2505.12805) and of what it is compared with, as a Flower strategy."""

import json
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..tuners.fedsvd import factored_svd, is_due
from .checks import Admitted, AuditEntry, Limits, Reply, admit, read_examples, read_state
from .flower import (
    AggregationError,
    Array,
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
    Strategy,
)
from .state import Product, average_AB, average_B, fedex_lora, flexlora, refactorize_state

METHODS = {"fedsvd": "B", "ffa-lora": "B", "fedit": "AB", "flexlora": "AB", "fedex-lora": "AB"}
"""What clients train and send, by method."""

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"  # names of the records in every message

log = getLogger("flwr").log


def to_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Flower's form of a state: fp32, contiguous, npy without pickle."""
    return ArrayRecord(
        {name: Array(value.detach().float().contiguous().cpu().numpy()) for name, value in state.items()}
    )


def to_reply(message: Message) -> Reply:
    """Flower's message as plain data. What is not as agreed in its records becomes an error."""
    node = message.metadata.src_node_id
    if message.has_error():
        return Reply(node, error=message.error.reason or f"error {message.error.code}")
    arrays, metrics = message.content.array_records, message.content.metric_records
    if set(arrays) != {ARRAYS} or len(metrics) > 1:
        return Reply(node, error=f"expected one record {ARRAYS!r} and at most one of metrics in the reply")
    return Reply(node, arrays[ARRAYS], next(iter(metrics.values()), {}))


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
        min_valid: a round with fewer admitted replies raises. Default 1.
        weighting: "examples": by the clients' numbers of examples (McMahan et al., the reference's default).
            "uniform": all equal. Default: "examples", or "uniform" where `private`.
        private: clients train with differential privacy. They then withhold the number of their examples and their
            loss, which are not noised; so `weighting` must be "uniform".
        limits: what one client may say; see `Limits`.
        seed: draws the clients. The global random state is left alone.
        checkpoints: a folder; if given, `checkpoint` writes there after every round.
        evaluate_clients: ask all nodes for an evaluation of the new state after each round. Default False.
        connect_timeout: seconds to wait for `min_nodes`.

    Attributes:
        audit: an `AuditEntry` for every reply that was dropped, clipped or missing.
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
        weighting: Literal["examples", "uniform"] | None = None,
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
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if private and evaluate_clients:
            raise ValueError("private clients do not evaluate, since metrics are not noised: no evaluate_clients")
        if private and weighting == "examples":
            raise ValueError('private clients withhold the number of their examples: use weighting="uniform"')
        if weighting not in (None, "examples", "uniform"):
            raise ValueError(f'weighting must be "examples" or "uniform", got {weighting!r}')
        for name, value in (("min_valid", min_valid), ("min_nodes", min_nodes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if clients_per_round is not None and clients_per_round < min_valid:
            raise ValueError(f"clients_per_round={clients_per_round} can never give min_valid={min_valid} replies")
        self.method = method
        self.factors = METHODS[method]
        self.refactorize_every = refactorize_every
        self.refactorize_warmup = refactorize_warmup
        self.clients_per_round = clients_per_round
        self.min_nodes = max(min_nodes, clients_per_round or 1)
        self.min_valid = min_valid
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
        self.round = 0  # finished rounds
        self._first = 0  # rounds finished before this `start`
        self._asked: list[int] = []

    def summary(self) -> None:
        log(INFO, "\t├── %s, clients send %s", self.method, " and ".join(f"lora_{f}" for f in self.factors))
        log(INFO, "\t└── average by %s, at least %d valid replies", self.weighting, self.min_valid)

    def follow(self, config: Any) -> None:
        """Takes from an adapter's config when to refactorise, as far as it says so and this strategy was not told."""
        for name in ("refactorize_every", "refactorize_warmup"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(config, name, None))

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
        """Flower's loop; see `flwr.serverapp.strategy.Strategy.start`. After `resume` its rounds count on.

        Raises:
            ValueError: the strategy holds another state than `initial_arrays`, of rounds before or a checkpoint.
        """
        if self.state and dict(initial_arrays) != dict(to_record(self.sent())):
            raise ValueError(
                f"this strategy goes on from round {self.round}, with `to_record(strategy.sent())`: start from other "
                "arrays with a new one"
            )
        self._first = self.round
        return super().start(grid, initial_arrays, *args, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        number = self._first + server_round
        if not self.state:
            self._load(arrays)
        nodes = self._connected(grid)
        wanted = self.clients_per_round or len(nodes)
        self._asked = sorted(random.Random(f"{self.seed}, round {number}").sample(nodes, wanted))
        said = {
            "server-round": number,
            "method": self.method,
            "factors": self.factors,
            "refactorized": self.refactorized,
        }
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({**config, **said})})
        return [Message(content, node, MessageType.TRAIN, group_id=str(number)) for node in self._asked]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next state and the round's metrics: how many replies were "admitted" and "dropped", and their "loss".

        Raises:
            AggregationError: fewer than `min_valid` replies are left, or the average is not finite; the state stays.
        """
        number = self._first + server_round
        admitted, entries = admit(
            map(to_reply, replies),
            self._origin(),
            asked=self._asked,
            round=number,
            limits=self.limits,
            count_examples=self.weighting == "examples",
        )
        self.audit += entries
        for entry in entries:
            log(WARNING, "round %d, node %d: %s: %s", number, entry.node, entry.action, entry.reason)
        if len(admitted) < self.min_valid:
            raise AggregationError(
                f"round {number}: {len(admitted)} of {len(self._asked)} replies are valid, fewer than "
                f"min_valid={self.min_valid}: " + "; ".join(f"node {entry.node}: {entry.reason}" for entry in entries)
            )
        self._update(admitted, number)
        self.round = number
        if self.checkpoints is not None:
            self.checkpoint(self.checkpoints)
        dropped = sum(entry.action == "dropped" for entry in entries)
        metrics: dict[str, Any] = {"admitted": len(admitted), "dropped": dropped}
        losses = [(one.examples, one.loss) for one in admitted if one.loss is not None]
        if losses and not self.private:
            metrics["loss"] = sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)
        return to_record(self.sent()), MetricRecord(metrics)

    def _update(self, admitted: list[Admitted], number: int) -> None:
        parts = ((one.examples, one.tensors()) for one in admitted)
        state, residual, values = dict(self.state), self.residual, self.singular_values
        try:
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
        except ValueError as error:
            raise AggregationError(f"round {number}: {error}") from error
        if bad := [name for name, value in (state | residual).items() if not torch.isfinite(value).all()]:
            raise AggregationError(
                f"round {number}: the average is not finite in {bad[0]!r}; set Limits.max_update_norm"
            )
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
        state = read_state(arrays, shapes)
        self.state = {name: value for name, value in state.items() if name.endswith((".lora_A", ".lora_B"))}
        self.residual = {name: value for name, value in state.items() if name not in self.state}

    def _connected(self, grid: Grid) -> list[int]:
        end = time.monotonic() + self.connect_timeout
        while len(nodes := sorted(grid.get_node_ids())) < self.min_nodes:
            if time.monotonic() > end:
                raise AggregationError(
                    f"{len(nodes)} nodes are connected after {self.connect_timeout:.0f} s, {self.min_nodes} are needed"
                )
            time.sleep(1)
        return nodes

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if not self.evaluate_clients:
            return []
        number = self._first + server_round
        self._asked = self._connected(grid)
        said = {"server-round": number, "method": self.method, "refactorized": self.refactorized}
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({**config, **said})})
        return [Message(content, node, MessageType.EVALUATE, group_id=str(number)) for node in self._asked]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean of each metric, weighted by examples; replies that are no finite numbers are left out."""
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        heard: set[int] = set()
        for message in replies:
            node = message.metadata.src_node_id
            try:
                if message.has_error():
                    raise ValueError(f"the client failed: {message.error.reason}"[: self.limits.max_error])
                if node in heard or node not in self._asked:
                    raise ValueError("a second reply, or from a node that was not asked")
                heard.add(node)
                metrics: Mapping[str, Any] = next(iter(message.content.metric_records.values()), {})
                n = read_examples(metrics, self.limits)
                for name, value in metrics.items():
                    if name != "num-examples" and isinstance(value, int | float) and abs(value) < 1e300:
                        sums[name] = sums.get(name, 0.0) + n * value
                        weights[name] = weights.get(name, 0) + n
            except ValueError as error:
                self.audit.append(AuditEntry(self._first + server_round, node, f"evaluation: {error}"))
        return MetricRecord({name: total / weights[name] for name, total in sums.items()}) if sums else None

    def checkpoint(self, folder: str | Path) -> None:
        """Writes the global state (safetensors) and strategy.json; the old pair stays until the new one is whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = f"state-{self.round}.safetensors"
        save_file({name: value.contiguous() for name, value in self.sent().items()}, folder / tensors)
        known = {
            "format": 1,
            "method": self.method,
            "round": self.round,
            "refactorized": self.refactorized,
            "state": tensors,
            "audit": [asdict(entry) for entry in self.audit],
        }
        draft = folder / "strategy.json.part"
        draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
        draft.replace(folder / "strategy.json")
        for old in folder.glob("state-*.safetensors"):
            if old.name != tensors:
                old.unlink()

    def resume(self, folder: str | Path) -> ArrayRecord:
        """Takes up a checkpoint: returns the arrays for `start`, whose rounds then count on from there.

        Raises:
            ValueError: no checkpoint of this method there, or a damaged one; the strategy stays as it was.
        """
        folder = Path(folder)
        try:
            known = json.loads((folder / "strategy.json").read_text(encoding="utf-8"))
            if known["format"] != 1 or known["method"] != self.method:
                raise ValueError(f"it is of method {known['method']!r} in format {known['format']}")
            audit = [AuditEntry(**entry) for entry in known["audit"]]
            number, refactorized = int(known["round"]), bool(known["refactorized"])
            with safe_open(folder / Path(known["state"]).name, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if bad := [name for name, value in state.items() if not torch.isfinite(value).all()]:
                raise ValueError(f"{bad[0]!r} is not finite")
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"no checkpoint to resume {self.method} from in {folder}: {error}") from error
        arrays = to_record(state)
        self._load(arrays)
        self.audit, self.round, self.refactorized = audit, number, refactorized
        return arrays


def joined(residual: Mapping[str, Tensor], new: Product) -> dict[str, Tensor]:
    """FedEx-LoRA's residuals of all rounds so far, as "<layer>.residual_B" (d_out, k) and "....residual_A" (k, d_in).

    Their ranks add up round by round, until a layer's shorter side bounds them.
    """
    factors: dict[str, Tensor] = {}
    for name, (B, A) in new.items():
        keys = (f"{name}.residual_B", f"{name}.residual_A")
        if keys[0] in residual:
            B, A = torch.cat([residual[keys[0]], B], 1), torch.cat([residual[keys[1]], A])
        if len(A) > min(len(B), A.shape[1]):
            U, S, A = factored_svd(A.double(), B.double())
            B = U * S
        factors |= {keys[0]: B.float(), keys[1]: A.float()}
    return factors
