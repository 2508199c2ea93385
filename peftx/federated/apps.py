"""Flower's two apps. The same ones run in one process, in a deployment and in Flower's simulation."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from logging import ERROR, INFO, getLogger
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .accounting import BudgetExceeded
from .checkpoint import write_text
from .checks import ArrayLike, Rejected, check_count, check_keys, read_state
from .flower import ClientApp, Context, Error, Grid, Message, MetricRecord, RecordDict, Result, ServerApp
from .grid import REFUSED
from .ledger import spending
from .local import LocalSettings, train_local
from .messages import ARRAYS, CONFIG, METRICS, to_record
from .privacy import DPSpec
from .state import Factors, Product, State, client_state, fold, global_state, load_global
from .strategy import FedSVDStrategy

BuildModel = Callable[[Context], nn.Module]
LoadData = Callable[[Context], tuple[Any, Any]]
Evaluate = Callable[[nn.Module, Context], Mapping[str, float]]

Sent = tuple[State, Product]

log = getLogger("flwr").log


def receive(
    model: nn.Module,
    arrays: Mapping[str, ArrayLike],
    adapter_name: str,
    *,
    orthonormal: bool = False,
    factors: Factors = "AB",
) -> None:
    """Loads what the server sent, after checking all of it: names, shapes, finite fp32 values of a plausible size,
    orthonormal rows of A.

    Base weights change only where clients train `factors` "AB" and the server sends FedEx-LoRA's residuals.

    Raises:
        ValueError: names the array and what is wrong; the adapter is as it was.
    """
    load(
        model, read_sent(arrays, shapes_of(model, adapter_name), orthonormal=orthonormal, factors=factors), adapter_name
    )


def shapes_of(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in global_state(model, adapter_name).items()}


def read_sent(
    arrays: Mapping[str, ArrayLike], shapes: Mapping[str, tuple[int, ...]], *, orthonormal: bool, factors: Factors
) -> Sent:
    """The factors by name, and FedEx-LoRA's residuals by layer; see `receive`. No model has a part in it.

    Raises:
        Rejected: names the array and what is wrong.
    """
    extra = {name for name in arrays if ".residual_" in name} if factors == "AB" else set()
    state = read_state({k: v for k, v in arrays.items() if k not in extra}, shapes, orthonormal=orthonormal)
    residual = read_state({k: arrays[k] for k in extra}, {k: tuple(arrays[k].shape) for k in extra})
    layers = {name.rpartition(".")[0] for name in extra}
    check_keys(extra, {f"{layer}.residual_{factor}" for layer in layers for factor in "AB"})
    return state, {layer: (residual[f"{layer}.residual_B"], residual[f"{layer}.residual_A"]) for layer in layers}


def load(model: nn.Module, sent: Sent, adapter_name: str) -> None:
    state, product = sent
    fold(model, product, adapter_name)
    load_global(model, state, adapter_name)


def set_trainable(model: nn.Module, factors: Factors, adapter_name: str = "default") -> None:
    """Trains the adapter's lora_B, and its lora_A too if `factors` says so; nothing else.

    Raises:
        ValueError: A is to be trained, of an adapter whose A is constant.
    """
    configs: Any = model.peft_config
    if "A" in factors and configs[adapter_name].peft_type == "FEDSVD":
        raise ValueError('the A of a FEDSVD adapter never trains: factors="AB" needs a `LoraConfig`')
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".lora_{factor}.{adapter_name}." in name for factor in factors))


def make_client_app(
    build_model: BuildModel,
    load_data: LoadData,
    settings: LocalSettings | Callable[[Context], LocalSettings],
    *,
    privacy: DPSpec | None = None,
    rounds: int | None = None,
    factors: Literal["B", "AB"] = "B",
    evaluate: Evaluate | None = None,
    ledger: str | Path | Callable[[Context], str | Path] | None = None,
    adapter_name: str = "default",
) -> ClientApp:
    """A Flower client: checks and loads what the server sent, trains, and returns what it trained.

    Only the adapter trains: a classifier, too, stays as `build_model` gave it. The client returns lora_B and, without
    privacy, the number of its examples and its mean loss. With privacy both are withheld, since neither is noised, and
    so is the text of every error that user code may raise, which goes to the client's own log; the accountant's history
    stays in the node's `context.state`, and a round that would exceed the budget is refused with an error that the
    server audits.

    Flower keeps `context.state` in memory and for one run: another run, or a node that is restarted, starts with
    nothing spent. Where that is not meant, give a `ledger`. And a node runs what is submitted, this app included:
    `privacy` guards against those who see the factors, not against those who may submit a run.

    Args:
        build_model: gives a model with the adapter, the same one on every node but for its data: base weights are never
            sent. A new one each time for FedEx-LoRA, which changes base weights. `context.run_config` and
            `context.node_config` ("partition-id") are there for it and for `load_data`.
        load_data: gives this node's dataset and its collator, as `train_local` takes them.
        settings: for each round; "partition-id" and round are mixed into its seed.
        privacy: train with differential privacy (`DPSpec`). The client decides, not the server.
        rounds: how many rounds this client plans to take part in, for the noise that an epsilon allows. Default:
            "rounds" of the run's configuration, else what the server announces; if nothing says it, a client with an
            epsilon refuses. More are refused once the budget is spent; fewer spend less.
        factors: what this client trains and sends: "B", or "AB" for FedIT, FlexLoRA and FedEx-LoRA. A server that asks
            for something else gets an error.
        evaluate: metrics of the received model on this node's data, for `FedSVDStrategy(evaluate_clients=True)`. Not
            with privacy, as they are not noised.
        ledger: a JSON file of this node and its data, in which the accountant's history outlives runs and restarts. A
            round is on disk before it is trained, under a lock (`<ledger>.lock`): runs that overlap spend from one
            budget. What is no well-formed history is refused. Default: none. Or a function of the context.
        adapter_name: the adapter's name.

    Raises:
        ValueError: `evaluate` together with `privacy`, a `ledger` without, or `rounds` that are no positive integer.
    """
    if privacy is not None and evaluate is not None:
        raise ValueError("metrics of a client's data are not noised: no `evaluate` with `privacy`")
    if privacy is None and ledger is not None:
        raise ValueError("a `ledger` keeps what `privacy` spends: there is none")
    planned_rounds(rounds)
    app = ClientApp()

    def ledger_of(context: Context) -> Path | None:
        found = ledger(context) if callable(ledger) else ledger
        return None if found is None else Path(found).resolve()  # one lock, and one file, by whatever name

    def read(message: Message, model: nn.Module) -> Sent:
        turned = bool(message.content.config_records[CONFIG]["refactorized"])
        arrays, shapes = message.content.array_records[ARRAYS], shapes_of(model, adapter_name)
        return read_sent(arrays, shapes, orthonormal=turned, factors=factors)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            return answer(message, context)
        except BaseException as error:
            if privacy is None or isinstance(error, KeyboardInterrupt):
                raise
            log(ERROR, "the round failed", exc_info=error)  # its text may tell what the data are, whoever raised it
            return _refusal(message, "an error that its own log tells")

    def answer(message: Message, context: Context) -> Message:
        config = message.content.config_records[CONFIG]
        asked = config["factors"]
        if asked != factors:
            return _refusal(
                message, f"the server asks for the factors {str(asked)[:10]!r}, this client sends {factors!r}"
            )
        planned = planned_rounds(rounds, context.run_config.get("rounds"), config.get("rounds"))
        if planned is None and privacy is not None and privacy.epsilon is not None:
            return _refusal(
                message,
                "an epsilon is spread over the rounds of a run, and nothing says how many: give `rounds` to "
                '`make_client_app`, or "rounds" in the run\'s configuration',
            )
        model = build_model(context)
        try:
            sent = read(message, model)
        except Rejected as error:  # of what the server sent, before any data
            return _refusal(message, str(error))
        load(model, sent, adapter_name)
        set_trainable(model, factors, adapter_name)
        dataset, collator = load_data(context)
        local = settings(context) if callable(settings) else settings
        total = None if planned is None else planned * local.steps
        number, metrics = int(str(config["server-round"])), MetricRecord()
        cost = (
            nullcontext()
            if privacy is None
            else spending(context, ledger_of(context), privacy, len(dataset), local, total)
        )
        try:
            with cost as history:
                result = train_local(
                    model,
                    dataset,
                    collator,
                    local,
                    privacy=privacy,
                    history=history,
                    total_steps=total,
                    round=number,
                    node=place(context),
                )
                arrays = to_record(client_state(model, adapter_name, factors))
        except BudgetExceeded as error:
            log(INFO, "%s", error)  # here only: what was spent tells how many records there are
            return _refusal(message, "the privacy budget of this client does not allow another round")
        if privacy is None:
            metrics["num-examples"] = result.samples
            if result.loss is not None:
                metrics["loss"] = result.loss
        return Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), reply_to=message)

    if evaluate is not None:

        @app.evaluate()
        def evaluation(message: Message, context: Context) -> Message:
            model = build_model(context)
            load(model, read(message, model), adapter_name)
            found = {name: float(value) for name, value in evaluate(model.eval(), context).items()}
            metrics = MetricRecord({"num-examples": len(load_data(context)[0]), **found})
            return Message(RecordDict({METRICS: metrics}), reply_to=message)

    return app


def planned_rounds(*said: Any) -> int | None:
    """The first of several numbers of rounds that is said; None if none is.

    Raises:
        ValueError: it is no positive integer.
    """
    for value in said:
        if value is not None:
            number = int(value) if isinstance(value, str) and value.isdecimal() else value
            check_count("rounds", number)
            return number
    return None


def place(context: Context) -> int:
    """Which client this node is: its "partition-id", which is the same wherever the apps run, else its node id."""
    return int(context.node_config.get("partition-id", context.node_id))


def _refusal(message: Message, reason: str) -> Message:
    log(INFO, "refused: %s", reason)
    return Message(Error(REFUSED, reason), reply_to=message)


def make_server_app(
    build_model: BuildModel,
    strategy: FedSVDStrategy | Callable[[Context], FedSVDStrategy],
    *,
    num_rounds: int | None = None,
    evaluate: Evaluate | None = None,
    output: str | Path | None = None,
    timeout: float = 3600.0,
    adapter_name: str = "default",
    on_end: Callable[[FedSVDStrategy, Result], None] | None = None,
) -> ServerApp:
    """A Flower server: starts from the model's adapter and runs the strategy's rounds.

    When to refactorise is the strategy's to say; what it leaves open, the `FedSVDConfig` of the adapter says.

    Args:
        build_model: gives the model of the clients; see `make_client_app`.
        strategy: or a function of the context that makes it, which a second run in one process needs.
        num_rounds: default: "rounds" of the run's configuration.
        evaluate: metrics of the global model, before the first round and after each. Data of the server, no client's.
        output: a folder for metrics.json (by round, the audit, and the error if one ended the run) and a checkpoint of
            the last state, which is there after each round. Both are written whatever ends the run, an error or an
            interruption. Default: "output" of the run's configuration; without either nothing is written.
        timeout: seconds that a round's replies may take.
        adapter_name: the adapter's name.
        on_end: called with the strategy and Flower's result, if no error ended the run.

    Raises:
        ValueError: when it runs, if nothing says how many rounds.
        AggregationError: when it runs, if too many rounds failed; see `FedSVDStrategy`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        rounds = planned_rounds(num_rounds, config.get("rounds"))
        if rounds is None:
            raise ValueError('how many rounds? Give num_rounds, or "rounds" in the run\'s configuration')
        rule = strategy if isinstance(strategy, FedSVDStrategy) else strategy(context)

        folder = output if output is not None else config.get("output")
        if folder:
            Path(str(folder)).mkdir(parents=True, exist_ok=True)  # now, if it cannot be

        def central(number: int, arrays: Any) -> MetricRecord | None:
            if folder and number:
                rule.checkpoint(str(folder))
            if evaluate is None:
                return None
            model = build_model(context)  # anew, since FedEx-LoRA changes base weights
            receive(model, arrays, adapter_name, orthonormal=rule.refactorized)
            return MetricRecord({name: float(value) for name, value in evaluate(model.eval(), context).items()})

        ended: BaseException | None = None
        try:
            model: Any = build_model(context)
            rule.follow(model.peft_config[adapter_name])
            arrays = to_record(rule.sent() or global_state(model, adapter_name))
            del model
            result = rule.start(grid, arrays, num_rounds=rounds, timeout=timeout, evaluate_fn=central)
        except BaseException as error:  # an interruption too
            ended = error
            raise
        finally:
            if folder and rule.state:
                rule.checkpoint(str(folder))
            if folder:
                write_text(Path(str(folder)) / "metrics.json", json.dumps(report(rule, ended), indent=1))
        if on_end is not None:
            on_end(rule, result)

    return app


def report(strategy: FedSVDStrategy, error: BaseException | None = None) -> dict[str, Any]:
    """Metrics by round, of the server and of the clients, the audit, and what ended the run, as plain data."""
    result = strategy.result
    parts = {
        "server": result.evaluate_metrics_serverapp,
        "train": result.train_metrics_clientapp,
        "clients": result.evaluate_metrics_clientapp,
    }
    return {
        "method": strategy.method,
        **{part: {number: dict(found) for number, found in known.items()} for part, known in parts.items()},
        "audit": [asdict(entry) for entry in strategy.audit],
        "skipped": strategy.skipped,
        "error": None if error is None else f"{type(error).__name__}: {error}".removesuffix(": "),
    }
