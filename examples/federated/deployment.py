"""The app in Flower's real deployment, on this machine: a superlink and supernodes on 127.0.0.1, ended at the end.

    python deployment.py [--rounds 3] [--clients 3] [--method fedsvd] [--epsilon 6] [--logs FOLDER]

Ports are free ones, Flower's files go into a temporary folder, telemetry, update checks and installs at run time are
off, and every process started here is ended by its own id. Each message starts a new Python, so this takes minutes.
`--insecure` is for a loopback only: between machines use TLS and `--enable-supernode-auth`.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

APP = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent  # where pip put Flower's commands
HOST = "127.0.0.1"


def environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # superlink and supernodes start commands by name
    }


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(port: int, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.5)
    raise RuntimeError(f"nothing answers on port {port}: {process.args[0]} ended or is too slow; see its log")


@contextlib.contextmanager
def running(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process in a session of its own; it and what it started are ended at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        yield process
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)  # the session's group has its leader's id
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)


def deploy(config: dict, folder: Path, timeout: float = 1200, simulation: bool = False) -> dict:
    """Runs the app; metrics by round as the server wrote them. Logs stay in `folder`.

    In a simulation the superlink starts Ray, whose actors are the clients, in place of supernodes.
    """
    home, output = folder / "home", folder / "output"
    home.mkdir(parents=True)
    env = environment(home)
    port, *ports = free_ports(1 + config["clients"])
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "{HOST}:{port}"\ninsecure = true\n')
    with contextlib.ExitStack() as stack:

        def start(name: str, command: list[str]) -> subprocess.Popen:
            return stack.enter_context(running(command, folder / f"{name}.log", env))

        link = [f"{BIN}/flower-superlink", "--insecure", "--host", HOST, "--port", str(port)]
        wait_for(port, start("superlink", [*link, "--simulation"] if simulation else link))
        for place, own in enumerate([] if simulation else ports):
            node = [f"{BIN}/flower-supernode", "--insecure", "--superlink", f"{HOST}:{port}"]
            node += ["--host", HOST, "--port", str(own)]
            node += ["--node-config", f"partition-id={place} num-partitions={config['clients']}"]
            start(f"supernode-{place}", node)
        overrides = " ".join(f"{name}={json.dumps(value)}" for name, value in {**config, "output": str(output)}.items())
        command = [f"{BIN}/flwr", "run", str(APP), "loopback", "--stream", "--run-config", overrides]
        if simulation:
            command += ["--federation-config", f"num-supernodes={config['clients']}"]
        run = start("run", command)
        end = time.monotonic() + timeout
        while not (output / "metrics.json").exists():
            if run.poll() is not None and not (output / "metrics.json").exists():
                raise RuntimeError(f"the run ended without metrics; see the logs in {folder}")
            if time.monotonic() > end:
                raise TimeoutError(f"no result after {timeout:.0f} s; see the logs in {folder}")
            time.sleep(1)
        metrics = json.loads((output / "metrics.json").read_text())
        if metrics["error"] is not None:
            raise RuntimeError(f"the run ended early: {metrics['error']}")
        return metrics


def main(arguments: list[str] | None = None, description: str | None = __doc__, simulation: bool = False) -> dict:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--method", default="fedsvd")
    parser.add_argument("--epsilon", type=float, default=0.0)
    parser.add_argument("--logs", type=Path, help="keep the logs in this folder, which must not exist")
    config = vars(parser.parse_args(arguments))
    logs = config.pop("logs")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        metrics = deploy(config, logs or Path(scratch) / "run", simulation=simulation)
    for number, found in metrics["server"].items():
        print(f"round {number}: accuracy {found['accuracy']:.3f}, loss {found['loss']:.4f}")
    return metrics


if __name__ == "__main__":
    main()
