"""What a server believes of a client's reply, and a client of the server's state.

A reply is untrusted input. Each is admitted whole or dropped whole, with one audit entry, and the round goes on with
the rest. Nothing is allocated on a client's word: what an array declares and its header are compared with what is
expected before its values are read. No engine is needed here; `strategy.py` translates Flower's messages.
"""

import io
import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

WEIGHT_CAP = 10.0  # times the median of the others': ordinary imbalance stays below
HEADER = 256  # bytes allowed above an array's values; numpy writes 128 for any array of ours
LARGEST = 6e4  # nothing that anybody trained comes near, and fp16, which ends at 65,504, holds it
LARGEST_RESIDUAL = 1e3  # spectral norm of what FedEx-LoRA adds to a base weight, before the adapter's scale
LARGEST_LOSS = 1e30  # what is no number that a mean could be made of
SKEW = 1e-3  # of max |A A^T - I| after a refactorisation
SUFFIX_A = ".lora_A"


class ArrayLike(Protocol):
    """Flower's `Array`: `data` in numpy's npy format, and what the sender says it holds."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


@dataclass(frozen=True)
class Limits:
    """How much one client may say.

    Beside these, no value of a factor may exceed 6e4: the client, and so every other one, would refuse it.

    Args:
        max_examples: the largest number of examples believed.
        max_update_norm: the largest Frobenius norm, over all layers, of a reply minus what was sent. None: only
            `median_factor` applies.
        median_factor: the largest norm as a multiple of the median, of which the largest are left out one after the
            other until it holds: so a reply that is dropped has no say. None: no such limit. It cannot bite with one or
            two replies, nor where more than half of them are zero.
        too_large: "drop" such a reply, or "clip" it to the limit, which is audited too.
        max_error: audit entries quote at most so many characters of a client's own words.
    """

    max_examples: int = 10_000_000
    max_update_norm: float | None = None
    median_factor: float | None = 10.0
    too_large: Literal["drop", "clip"] = "drop"
    max_error: int = 300

    def __post_init__(self) -> None:
        for name in ("max_examples", "max_error"):
            check_count(name, getattr(self, name))
        for name in ("max_update_norm", "median_factor"):
            check_factor(name, getattr(self, name))
        if self.too_large not in ("drop", "clip"):
            raise ValueError(f'too_large must be "drop" or "clip", got {self.too_large!r}')


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises `ValueError` unless `value` is an integer of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_factor(name: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is a positive finite number or None."""
    if value is not None:
        check_number(name, value, " or None")


def check_number(name: str, value: Any, also: str = "", *, zero: bool = False) -> None:
    """Raises `ValueError` unless `value` is a finite number above zero or, with `zero`, zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf or (zero and value == 0)):
        raise ValueError(f"{name} must be {'zero or ' if zero else ''}a positive finite number{also}, got {value!r}")


@dataclass(frozen=True)
class AuditEntry:
    """One reply that was not taken as it came, or did not come. `action` is "dropped", "clipped" or "capped"."""

    round: int
    node: int
    reason: str
    action: str = "dropped"


@dataclass(frozen=True)
class Reply:
    """What one node sent: named arrays and metrics, or the `error` it reported instead."""

    node: int
    arrays: Mapping[str, ArrayLike] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Admitted:
    """A reply that passed. `tensors()` reads its values (fp32), clipped if need be."""

    node: int
    examples: int
    norm: float
    loss: float | None
    reply: Reply
    origin: Mapping[str, Tensor]
    scale: float = 1.0

    def tensors(self) -> dict[str, Tensor]:
        found = {name: read_array(name, self.reply.arrays[name], tuple(old.shape)) for name, old in self.origin.items()}
        if self.scale == 1.0:
            return found
        return {name: torch.lerp(self.origin[name].float(), new, self.scale) for name, new in found.items()}


class Rejected(ValueError):
    """A reply or a state that must not be used; the message says why."""


def read_array(name: str, array: ArrayLike, shape: tuple[int, ...]) -> Tensor:
    """The values of a received array, fp32 of the expected `shape`.

    Raises:
        Rejected: for any other format, dtype or shape, in what the array declares or in its header, for a payload
            that is longer or shorter than its values, and for values that are not finite or above 6e4.
    """
    size = 4 * math.prod(shape)
    if array.stype != "numpy.ndarray":
        raise Rejected(f"{name}: serialised as {str(array.stype)[:40]!r}, expected 'numpy.ndarray'")
    if len(array.data) > size + HEADER:
        raise Rejected(f"{name}: a payload of {len(array.data)} bytes, expected at most {size + HEADER}")
    declared, kind = tuple(array.shape), str(array.dtype)
    if declared != shape:
        raise Rejected(f"{name}: shape {declared} declared, expected {shape}")
    if kind != "float32":
        raise Rejected(f"{name}: dtype {kind[:40]} declared, expected float32")
    told, fortran, dtype, start = _header(name, array.data)
    if told != shape:
        raise Rejected(f"{name}: shape {told} in the header, expected {shape}")
    if dtype != np.dtype("<f4"):
        raise Rejected(f"{name}: dtype {dtype} in the header, expected float32")
    if len(array.data) != start + size:
        raise Rejected(f"{name}: {len(array.data) - start} bytes of values, expected {size}")
    values = np.ndarray(shape, dtype, array.data, start, order="F" if fortran else "C")
    found = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    check_values(name, found)
    return found


def check_values(name: str, value: Tensor) -> None:
    """Raises `Rejected` for values that are not finite, or of a magnitude above 6e4."""
    largest = value.abs().max().item() if value.numel() else 0.0
    if not math.isfinite(largest):
        raise Rejected(f"{name}: NaN or infinite values")
    if largest > LARGEST:
        raise Rejected(f"{name}: a value of magnitude {largest:.2g}, expected at most {LARGEST:g}")


def _header(name: str, data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, dtype and length of an npy header; allocates nothing that the header asks for."""
    stream = io.BytesIO(data[: 4 * HEADER])
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream, max_header_size=2 * HEADER)
    except Exception as error:  # whatever a forged header provokes in numpy's parser is a reason to drop it
        raise Rejected(f"{name}: not a readable npy array ({type(error).__name__})") from error
    return shape, fortran, dtype, stream.tell()


def check_keys(found: Collection[str], expected: Collection[str]) -> None:
    """Raises `Rejected` unless `found` are exactly the names `expected`."""
    foreign = sorted(set(found) - set(expected))
    if any(name.endswith(SUFFIX_A) for name in foreign):
        raise Rejected(f"it holds lora_A, which is the server's: {_some(foreign)}")
    if foreign:
        raise Rejected(f"unexpected arrays: {_some(foreign)}")
    if missing := sorted(set(expected) - set(found)):
        raise Rejected(f"missing arrays: {_some(missing)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name[:100]) for name in names[:3]) + more


def read_examples(metrics: Mapping[str, Any], limits: Limits) -> int:
    """The number of examples that a reply reports as "num-examples".

    Raises:
        Rejected: unless it is an integer between 1 and `limits.max_examples`.
    """
    number = metrics.get("num-examples")
    if type(number) is not int:  # no bool, no float, and so no NaN
        raise Rejected(f"num-examples must be an integer, got {_short(number)}")
    if not 1 <= number <= limits.max_examples:
        raise Rejected(f"num-examples must be from 1 to {limits.max_examples}, got {_short(number)}")
    return number


def _short(value: Any) -> str:
    if type(value) is int and value.bit_length() > 100:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:40]


def read_loss(metrics: Mapping[str, Any]) -> float | None:
    """The mean training loss that a reply reports as "loss"; None where it is missing, or no number below 1e30."""
    loss = metrics.get("loss")
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not abs(loss) < LARGEST_LOSS:
        return None
    return float(loss)


def check_sender(reply: Reply, asked: Collection[int], heard: set[int], limits: Limits) -> None:
    """Raises `Rejected` unless a node that was asked, and is not `heard` yet, sent more than an error; it is then."""
    if reply.node not in asked:
        raise Rejected("a reply from a node that was not asked")
    if reply.node in heard:
        raise Rejected("a second reply")
    heard.add(reply.node)
    if reply.error is not None:
        raise Rejected(f"the client failed: {reply.error[-limits.max_error :]}")


def admit(
    replies: Iterable[Reply],
    origin: Mapping[str, Tensor],
    *,
    asked: Collection[int],
    round: int,
    limits: Limits | None = None,
    count_examples: bool = True,
    weight_cap: float | None = WEIGHT_CAP,
) -> tuple[list[Admitted], list[AuditEntry]]:
    """The replies to average, in the order of their nodes, and an entry for each that was not taken as it came.

    Args:
        replies: as they came, at most one for each node asked.
        origin: what the clients trained from, by name: exactly these arrays are expected back, in these shapes.
        asked: the nodes that were asked.
        round: for the audit.
        limits: default: `Limits()`.
        count_examples: whether "num-examples" is needed. If not it is not read, and each reply counts as one example.
        weight_cap: see `capped`.

    Of several replies of a node the first counts. The limit on norms is found from all replies that passed the other
    checks. Memory: the tensors of one reply at a time.
    """
    limits = limits or Limits()
    passed: list[Admitted] = []
    entries: list[AuditEntry] = []
    heard: set[int] = set()
    for reply in replies:
        try:
            check_sender(reply, asked, heard, limits)
            passed.append(_check(reply, origin, limits, count_examples))
        except Rejected as reason:
            entries.append(AuditEntry(round, reply.node, str(reason)))
    entries += [AuditEntry(round, node, "no reply in time") for node in sorted(set(asked) - heard)]
    bounded = sorted(_bound(passed, limits, round, entries), key=lambda one: one.node)
    counts = capped([one.examples for one in bounded], weight_cap)
    for place, (one, count) in enumerate(zip(bounded, counts, strict=True)):
        if count < one.examples:
            told = f"{one.examples} examples count as {count}, {weight_cap:g} times the median of the others'"
            entries.append(AuditEntry(round, one.node, told, "capped"))
            bounded[place] = replace(one, examples=count)
    return bounded, entries


def capped(examples: Sequence[int], factor: float | None) -> list[int]:
    """Numbers of examples, each at most `factor` times the median of the others', and at least 1.

    Nobody can check such a number, so that it must not decide the average. The median is not the liar's to choose, as
    long as fewer than half of the clients lie. Weights are capped in arXiv:1710.06963, too, by a constant. With
    `factor` None, or a single client, nothing is capped.
    """
    if factor is None or len(examples) < 2:
        return list(examples)
    ordered, others = sorted(examples), len(examples) - 1
    found = []
    for number in examples:
        place = bisect_left(ordered, number)
        low, high = (ordered[i + (i >= place)] for i in ((others - 1) // 2, others // 2))
        bound = factor * (low + high) / 2
        found.append(number if number <= bound else max(1, int(bound)))
    return found


def _check(reply: Reply, origin: Mapping[str, Tensor], limits: Limits, count_examples: bool) -> Admitted:
    check_keys(reply.arrays.keys(), origin.keys())
    examples = read_examples(reply.metrics, limits) if count_examples else 1
    squares = 0.0
    for name, old in origin.items():
        new = read_array(name, reply.arrays[name], tuple(old.shape))
        squares += (new.double() - old.double()).square().sum().item()
    return Admitted(reply.node, examples, math.sqrt(squares), read_loss(reply.metrics), reply, origin)


def _bound(passed: list[Admitted], limits: Limits, round: int, entries: list[AuditEntry]) -> Iterator[Admitted]:
    """Drops or clips what is further from the origin than the limit."""
    bound = limits.max_update_norm or math.inf
    norms = sorted(one.norm for one in passed if one.norm <= bound)
    while limits.median_factor and norms and norms[-1] > (allowed := limits.median_factor * median(norms)) > 0:
        bound = allowed
        norms.pop()
    for one in passed:
        if one.norm <= bound:
            yield one
            continue
        clip = limits.too_large == "clip"
        reason = f"an update of norm {one.norm:.3g}, expected at most {bound:.3g}"
        entries.append(AuditEntry(round, one.node, reason, "clipped" if clip else "dropped"))
        if clip:
            yield replace(one, norm=bound, scale=bound / one.norm)


def read_state(
    arrays: Mapping[str, ArrayLike], shapes: Mapping[str, tuple[int, ...]], *, orthonormal: bool = False
) -> dict[str, Tensor]:
    """A client's reading of what the server sent: fp32 tensors of exactly these names and shapes.

    Args:
        orthonormal: the state has been refactorised, so that the rows of each `lora_A` must be orthonormal to 1e-3.

    Raises:
        Rejected: names the array and what is wrong with it; see `check_state`.
    """
    check_keys(arrays.keys(), shapes.keys())
    state = {name: read_array(name, arrays[name], shape) for name, shape in shapes.items()}
    check_state(state, orthonormal=orthonormal)
    return state


def skewness(A: Tensor) -> float:
    """How far the rows of A (r, d_in) are from orthonormal: max |A A^T - I|."""
    return float((A @ A.T - torch.eye(len(A), device=A.device)).abs().max())


def check_state(state: Mapping[str, Tensor], *, orthonormal: bool = False) -> None:
    """What a state must be for a client to load it and for a server to send it: the same function on both sides.

    Args:
        state: "<layer>.lora_A", "....lora_B" and, for FedEx-LoRA, "....residual_A" and "....residual_B", fp32.
        orthonormal: the rows of each `lora_A` must be orthonormal to 1e-3, as after a refactorisation.

    Raises:
        Rejected: values that are not finite or above 6e4, rows that are not orthonormal, a residual that lacks its
            other factor, or whose product has a spectral norm above 1,000.
    """
    for name, value in state.items():
        check_values(name, value)
        if orthonormal and name.endswith(SUFFIX_A) and (error := skewness(value)) > SKEW:
            raise Rejected(f"{name}: its rows should be orthonormal after a refactorisation, they are {error:.1g} off")
    layers = {name.rpartition(".")[0] for name in state if ".residual_" in name}
    for layer in sorted(layers):
        B, A = (state.get(f"{layer}.residual_{factor}") for factor in "BA")
        if B is None or A is None:
            raise Rejected(f"{layer}: a residual without its other factor")
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != len(A):
            raise Rejected(f"{layer}: a residual of shapes {tuple(B.shape)} and {tuple(A.shape)}")
        left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (B, A.T))
        norm = torch.linalg.matrix_norm(left @ right.T, 2).item()
        if norm > LARGEST_RESIDUAL:
            raise Rejected(f"{layer}: a residual of norm {norm:.2g}, expected at most {LARGEST_RESIDUAL:g}")
