"""Flower's two apps. The same ones run in one process, in a deployment and in Flower's simulation."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from logging import ERROR, INFO, getLogger
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .checks import ArrayLike, Rejected, read_state
from .flower import ClientApp, ConfigRecord, Context, Error, Grid, Message, MetricRecord, RecordDict, Result, ServerApp
from .grid import REFUSED
from .local import LocalSettings, train_local
from .privacy import BudgetExceeded, DPSpec
from .state import Factors, client_state, fold, global_state, load_global
from .strategy import ARRAYS, CONFIG, METRICS, FedSVDStrategy, to_record

BuildModel = Callable[[Context], nn.Module]
LoadData = Callable[[Context], tuple[Any, Any]]
Evaluate = Callable[[nn.Module, Context], Mapping[str, float]]

PRIVACY = "privacy"  # the record of `context.state` that holds a client's accountant

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
    shapes = {name: tuple(value.shape) for name, value in global_state(model, adapter_name).items()}
    extra = {name for name in arrays if ".residual_" in name} if factors == "AB" else set()
    state = read_state({k: v for k, v in arrays.items() if k not in extra}, shapes, orthonormal=orthonormal)
    residual = read_state({k: arrays[k] for k in extra}, {k: tuple(arrays[k].shape) for k in extra})
    layers = {name.rpartition(".")[0] for name in extra}
    if extra != {f"{layer}.residual_{factor}" for layer in layers for factor in "AB"}:
        raise Rejected("a residual without its other factor")
    product = {layer: (residual[f"{layer}.residual_B"], residual[f"{layer}.residual_A"]) for layer in layers}
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
    so is the text of an error, which goes to the client's own log; the accountant's history stays in the node's
    `context.state`, and a round that would exceed the budget is refused with an error that the server audits.

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
            "rounds" of the run's configuration. More are refused once the budget is spent; fewer spend less.
        factors: what this client trains and sends: "B", or "AB" for FedIT, FlexLoRA and FedEx-LoRA. A server that asks
            for something else gets an error.
        evaluate: metrics of the received model on this node's data, for `FedSVDStrategy(evaluate_clients=True)`. Not
            with privacy, as they are not noised.
        ledger: a JSON file of this node and its data, in which the accountant's history outlives runs and restarts; it
            is on disk before a reply leaves. One run at a time. Default: none. Or a function of the context.
        adapter_name: the adapter's name.

    Raises:
        ValueError: `evaluate` together with `privacy`, or a `ledger` without.
    """
    if privacy is not None and evaluate is not None:
        raise ValueError("metrics of a client's data are not noised: no `evaluate` with `privacy`")
    if privacy is None and ledger is not None:
        raise ValueError("a `ledger` keeps what `privacy` spends: there is none")
    app = ClientApp()

    def ledger_of(context: Context) -> Path | None:
        found = ledger(context) if callable(ledger) else ledger
        return None if found is None else Path(found)

    def load(message: Message, context: Context) -> tuple[nn.Module, ConfigRecord]:
        config = message.content.config_records[CONFIG]
        model = build_model(context)
        arrays, turned = message.content.array_records[ARRAYS], bool(config["refactorized"])
        receive(model, arrays, adapter_name, orthonormal=turned, factors=factors)
        return model, config

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            return answer(message, context)
        except Exception as error:
            if privacy is None or isinstance(error, Rejected):
                raise
            log(ERROR, "the round failed", exc_info=error)  # its text may tell what the data are
            return _refusal(message, "an error that its own log tells")

    def answer(message: Message, context: Context) -> Message:
        asked = message.content.config_records[CONFIG]["factors"]
        if asked != factors:
            return _refusal(
                message, f"the server asks for the factors {str(asked)[:10]!r}, this client sends {factors!r}"
            )
        model, config = load(message, context)
        set_trainable(model, factors, adapter_name)
        dataset, collator = load_data(context)
        local = settings(context) if callable(settings) else settings
        planned = rounds if rounds is not None else context.run_config.get("rounds")
        try:
            result = train_local(
                model,
                dataset,
                collator,
                local,
                privacy=privacy,
                history=load_history(context, ledger_of(context)),
                total_steps=None if planned is None else int(planned) * local.steps,
                round=int(str(config["server-round"])),
                node=place(context),
            )
        except BudgetExceeded as error:
            log(INFO, "%s", error)  # here only: what was spent tells how many records there are
            return _refusal(message, "the privacy budget of this client does not allow another round")
        metrics = MetricRecord()
        if privacy is None:
            metrics["num-examples"] = result.samples
            if result.loss is not None:
                metrics["loss"] = result.loss
        else:
            keep_history(context, result.history, result.epsilon, ledger_of(context))
        arrays = to_record(client_state(model, adapter_name, factors))
        return Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), reply_to=message)

    if evaluate is not None:

        @app.evaluate()
        def evaluation(message: Message, context: Context) -> Message:
            model, _ = load(message, context)
            found = {name: float(value) for name, value in evaluate(model.eval(), context).items()}
            metrics = MetricRecord({"num-examples": len(load_data(context)[0]), **found})
            return Message(RecordDict({METRICS: metrics}), reply_to=message)

    return app


def place(context: Context) -> int:
    """Which client this node is: its "partition-id", which is the same wherever the apps run, else its node id."""
    return int(context.node_config.get("partition-id", context.node_id))


def load_history(context: Context, ledger: Path | None = None) -> list | None:
    """The accountant's history that this node kept, [[sigma, q, steps], ...]; None at the start."""
    if ledger is not None and ledger.exists():
        return json.loads(ledger.read_text(encoding="utf-8"))["history"]
    known = context.state.config_records.get(PRIVACY)
    return None if known is None else json.loads(str(known["history"]))


def keep_history(context: Context, history: Any, epsilon: float | None, ledger: Path | None = None) -> None:
    """Writes the accountant's history, and the epsilon spent so far, where the node finds them again."""
    spent = {} if epsilon is None else {"epsilon": float(epsilon)}
    if ledger is not None:
        draft = ledger.with_name(f"{ledger.name}.part")
        with draft.open("w", encoding="utf-8") as file:
            json.dump({"history": history, **spent}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(ledger)
    context.state[PRIVACY] = ConfigRecord({"history": json.dumps(history), **spent})


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
        output: a folder for metrics.json (by round, and the audit) and a checkpoint of the last state. Default:
            "output" of the run's configuration; without either nothing is written.
        timeout: seconds that a round's replies may take.
        adapter_name: the adapter's name.
        on_end: called with the strategy and Flower's result.

    Raises:
        ValueError: when it runs, if nothing says how many rounds.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        rounds = num_rounds if num_rounds is not None else config.get("rounds")
        if rounds is None:
            raise ValueError('how many rounds? Give num_rounds, or "rounds" in the run\'s configuration')
        rule = strategy if isinstance(strategy, FedSVDStrategy) else strategy(context)

        def central(number: int, arrays: Any) -> MetricRecord | None:
            if evaluate is None:
                return None
            model = build_model(context)  # anew, since FedEx-LoRA changes base weights
            receive(model, arrays, adapter_name, orthonormal=rule.refactorized)
            return MetricRecord({name: float(value) for name, value in evaluate(model.eval(), context).items()})

        model: Any = build_model(context)
        rule.follow(model.peft_config[adapter_name])
        arrays = to_record(rule.sent() or global_state(model, adapter_name))
        del model
        result = rule.start(grid, arrays, num_rounds=int(rounds), timeout=timeout, evaluate_fn=central)
        folder = output if output is not None else config.get("output")
        if folder:
            rule.checkpoint(str(folder))
            text = json.dumps(report(rule, result), indent=1)
            (Path(str(folder)) / "metrics.json").write_text(text, encoding="utf-8")
        if on_end is not None:
            on_end(rule, result)

    return app


def report(strategy: FedSVDStrategy, result: Result) -> dict[str, Any]:
    """Metrics by round, of the server and of the clients, and the audit, as plain data."""
    parts = {
        "server": result.evaluate_metrics_serverapp,
        "train": result.train_metrics_clientapp,
        "clients": result.evaluate_metrics_clientapp,
    }
    metrics = {part: {number: dict(found) for number, found in known.items()} for part, known in parts.items()}
    return {"method": strategy.method, **metrics, "audit": [asdict(entry) for entry in strategy.audit]}
