"""What runs on the server."""

from flwr.app import Context

from peftx.federated import FedSVDStrategy, make_server_app

from .task import build_model, evaluate


def strategy(context: Context) -> FedSVDStrategy:
    config = context.run_config
    clients, private = int(config["clients"]), float(config["epsilon"]) > 0
    return FedSVDStrategy(config["method"], min_nodes=clients, min_valid=2, private=private)


app = make_server_app(build_model, strategy, evaluate=evaluate)
