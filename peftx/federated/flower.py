"""Flower, imported quietly: the one place that imports it, and that says what to do where it is missing.

Flower reads its environment when it is imported. What the user has not set is set here, so that nothing is reported,
looked up or installed behind the user's back: `FLWR_TELEMETRY_ENABLED=0`, `FLWR_DISABLE_UPDATE_CHECK=1`,
`FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1` and, for simulations, `RAY_USAGE_STATS_ENABLED=0`.
"""

import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

try:
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Error,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
    )
    from flwr.clientapp import ClientApp
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.exception import AggregationError
    from flwr.serverapp.strategy import Result, Strategy
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise ImportError(
        f'federated training runs on Flower, which is missing: pip install "peftx[federated]". (Python says: {error})'
    ) from error

__all__ = [
    "AggregationError",
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "ErrorCode",
    "Grid",
    "Message",
    "MessageType",
    "MetricRecord",
    "RecordDict",
    "Result",
    "Run",
    "ServerApp",
    "Strategy",
    "TaskIdentity",
]
