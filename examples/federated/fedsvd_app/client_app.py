"""What runs on each client."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from peftx.federated import DPSpec, LocalSettings, make_client_app

from .task import BOTH, build_model, load_data

SETTINGS = LocalSettings(steps=10, batch_size=32, learning_rate=1e-2, optimizer="adamw", seed=1)

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """The client that this run's configuration describes; what the node's own says of "epsilon" and "ledger" counts."""
    epsilon = float(context.node_config.get("epsilon", context.run_config["epsilon"]))
    both = context.run_config["method"] in BOTH
    client = make_client_app(
        build_model,
        load_data,
        SETTINGS,
        factors="AB" if both else "B",
        privacy=DPSpec(epsilon=epsilon, also_train=("lora_A",) if both else ()) if epsilon else None,
        ledger=context.node_config.get("ledger") if epsilon else None,
    )
    return client(message, context)
