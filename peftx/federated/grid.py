"""Flower in one process: the apps that a deployment runs, without servers, for tests and small studies."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from uuid import uuid4

from .flower import (
    ClientApp,
    Context,
    Error,
    ErrorCode,
    Grid,
    Message,
    RecordDict,
    Run,
    ServerApp,
    TaskIdentity,
)

SERVER = 1  # the server's node id, as in Flower
REFUSED = ErrorCode.MOD_FAILED_PRECONDITION  # a client that will not train


@contextmanager
def identity(node: int, run: int) -> Iterator[None]:
    """Inside, Flower takes this process for `node`; afterwards for what it was.

    Flower's `Message` asks a private class of its engine who is sending. Nobody else here touches that class.
    """
    names = ("_node_id", "_run_id", "_task_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity._node_id, TaskIdentity._run_id, TaskIdentity._task_id = node, run, 1
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


class InProcessGrid(Grid):
    """A Flower `Grid` that calls a `ClientApp` for each message, one after the other.

        with InProcessGrid(client_app, 3) as grid:
            result = strategy.start(grid, arrays, num_rounds=5)

    A node keeps its `context.state` between messages, also where its app failed, as in a deployment. An exception
    becomes an error reply. A reply that is not ready when the time is over is not delivered, and whoever has not been
    called by then is not called.

    Args:
        client_app: called with a copy of each message.
        num_nodes: nodes 2, 3, ...; each has "partition-id" (from 0) and "num-partitions" in its `node_config`.
        run_config: what `context.run_config` holds; apps get a copy.
        contexts: the nodes' contexts of an earlier grid (`grid.contexts`), to go on with their state.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        contexts: Mapping[int, Context] | None = None,
    ) -> None:
        if num_nodes < 1:
            raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
        self.client_app = client_app
        self.run_config = dict(run_config or {})
        self._run = Run.create_empty(1)
        self._replies: dict[str, Message] = {}
        self._inside: Any = None
        nodes = range(SERVER + 1, SERVER + 1 + num_nodes)
        self.contexts: dict[int, Context] = {
            node: Context(
                run_id=self._run.run_id,
                node_id=node,
                node_config={"partition-id": place, "num-partitions": num_nodes},
                state=deepcopy(contexts[node].state) if contexts and node in contexts else RecordDict(),
                run_config={},
            )
            for place, node in enumerate(nodes)
        }

    def __enter__(self) -> "InProcessGrid":
        if self._inside is not None:
            raise RuntimeError("the grid is open already")
        self._inside = identity(SERVER, self._run.run_id)
        self._inside.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._inside, inside = None, self._inside
        inside.__exit__(*details)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        with identity(SERVER, self._run.run_id):
            return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        if self._inside is None:
            raise RuntimeError("the grid is closed: use it as `with InProcessGrid(...) as grid:`")
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Runs the clients; `pull_messages` hands out their replies."""
        return self._push(messages, None)

    def _push(self, messages: Iterable[Message], deadline: float | None) -> list[str]:
        names = []
        for message in messages:
            names.append(name := uuid4().hex)
            if deadline is None or time.monotonic() < deadline:
                reply = self._call(message, name)
                if deadline is None or time.monotonic() < deadline:
                    self._replies[name] = reply
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        return self.pull_messages(self._push(messages, deadline))

    def _call(self, message: Message, name: str) -> Message:
        request = deepcopy(message)
        request.metadata.__dict__["_message_id"] = name
        node = message.metadata.dst_node_id
        with identity(node, self._run.run_id):
            if node not in self.contexts:
                return Message(Error(ErrorCode.NODE_UNAVAILABLE, f"there is no node {node}"), reply_to=request)
            context = self.contexts[node]
            context.run_config = dict(self.run_config)
            try:
                reply = self.client_app(request, context)
                if not isinstance(reply, Message):
                    raise TypeError(f"the app gave no message but {type(reply).__name__}")
                return reply
            except (Exception, SystemExit) as error:  # a client that leaves does not take the others along
                reason = f"{type(error).__name__}: {error}"
                return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=request)


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    num_nodes: int,
    *,
    run_config: Mapping[str, Any] | None = None,
    contexts: Mapping[int, Context] | None = None,
) -> InProcessGrid:
    """Runs both apps in this process as `flwr run` would elsewhere; returns the grid, which has the nodes' contexts."""
    with InProcessGrid(client_app, num_nodes, run_config=run_config, contexts=contexts) as grid:
        server_app(
            grid,
            Context(
                run_id=grid.run.run_id,
                node_id=SERVER,
                node_config={},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            ),
        )
    return grid
