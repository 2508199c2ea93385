"""The app in one process: `python in_process.py [--rounds 5] [--clients 3] [--method fedsvd] [--epsilon 6]`."""

import argparse
import json
import logging
import tempfile
from pathlib import Path

from fedsvd_app import client_app, server_app

from peftx.federated import run_in_process


def main(arguments: list[str] | None = None) -> dict:
    """Metrics by round, as the server wrote them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--method", default="fedsvd")
    parser.add_argument("--epsilon", type=float, default=0.0)
    config = vars(parser.parse_args(arguments))
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        config["output"] = folder
        grid = run_in_process(server_app.app, client_app.app, config["clients"], run_config=config)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    for number, found in metrics["server"].items():
        print(f"round {number}: accuracy {found['accuracy']:.3f}, loss {found['loss']:.4f}")
    for context in grid.contexts.values():
        if "privacy" in context.state:
            print(f"client {context.node_config['partition-id']}: epsilon {context.state['privacy']['epsilon']:.2f}")
    return metrics


if __name__ == "__main__":
    main()
