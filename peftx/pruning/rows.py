"""Where samples come from: data with a length and indices, or a stream that is read from its start."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, Subset, get_worker_info

from ..utils import is_stream
from .selection import digest_of

PROBED = 64  # rows of a stream that are read twice, to see that they come in the same order


def length_of(dataset: Any) -> int | None:
    """Number of samples, None of a stream.

    Raises:
        ValueError: there are none, or nothing can be chosen from the stream, since it can be read once only, or comes
            in another order each time.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, str | bytes | Mapping) or not (hasattr(dataset, "__iter__") or not is_stream(dataset)):
        raise ValueError(f"a {kind} cannot be pruned: choosing samples needs a length and indices, or a stream")
    if not is_stream(dataset):
        if not (count := len(dataset)):
            raise ValueError("the data set is empty")
        return count
    if iter(dataset) is dataset:
        raise ValueError(
            f"a {kind} cannot be pruned: it can be read once, and choosing samples needs a length and indices, or a "
            "stream that starts anew: datasets.IterableDataset.from_generator(...), "
            "datasets.Dataset.from_generator(...) or a list"
        )
    if digest_of(islice(dataset, PROBED)) != digest_of(islice(dataset, PROBED)):
        raise ValueError(
            f"a {kind} that gives its rows in another order each time cannot be pruned, since the chosen ones are "
            "known by their places: shuffle with a seed, or prune before shuffling"
        )
    return None


class Table:
    """Samples by their places among the chosen `indices`."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices
        self.count: int | None = len(indices)

    def has(self, place: int) -> bool:
        return place < len(self.indices)

    def reach(self, place: int) -> int:
        """`place`, or the number of samples if that is less."""
        return min(place, len(self.indices))

    def read(self, start: int, stop: int) -> list[Any]:
        chosen = self.indices_of(start, stop)
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(chosen)
        return [self.dataset[i] for i in chosen]

    def indices_of(self, start: int, stop: int) -> list[int]:
        return list(self.indices[start:stop])

    def spread(self, size: int) -> list[Any]:
        """Up to `size` samples at even distances."""
        count = len(self.indices)
        places = sorted({i * (count - 1) // max(1, size - 1) for i in range(min(size, count))})
        return [self.dataset[self.indices[place]] for place in places]


class Stream:
    """Samples by their places in a stream; places may only grow."""

    def __init__(self, dataset: Iterable[Any]) -> None:
        self.rows: Iterator[Any] = iter(dataset)
        self.ahead: deque[Any] = deque()
        self.place = 0  # of the first one ahead
        self.count: int | None = None

    def has(self, place: int) -> bool:
        return self.reach(place) == place and self.fetch(1)

    def reach(self, place: int) -> int:
        """`place`, or the number of samples if that is less; what lies before is read over."""
        while self.place < place and self.fetch(1):
            self.ahead.popleft()
            self.place += 1
        return self.place

    def read(self, start: int, stop: int) -> list[Any]:
        if self.reach(start) < start:
            return []
        self.fetch(stop - start)
        return list(islice(self.ahead, stop - start))

    def indices_of(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop))

    def fetch(self, size: int) -> bool:
        """Whether at least `size` samples are ahead, now."""
        self.ahead.extend(islice(self.rows, max(0, size - len(self.ahead))))
        return len(self.ahead) >= size


class Kept(IterableDataset):
    """The rows of a stream at `indices` (ascending), in its order."""

    def __init__(self, dataset: Iterable[Any], indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, torch.tensor(indices)

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise ValueError(WORKERS)
        chosen = iter(self.indices.tolist())
        wanted = next(chosen, None)
        for place, row in enumerate(self.dataset):
            if wanted is None:
                return
            if place == wanted:
                yield row
                wanted = next(chosen, None)
        if wanted is not None:
            raise ValueError(f"the stream ended before its row {wanted}, which was chosen: it has changed since")


class Bare(IterableDataset):
    """A stream without anything but its rows."""

    def __init__(self, dataset: Iterable[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)


WORKERS = (
    "the rows chosen from a stream are known by their places, which workers would share out: dataloader_num_workers=0, "
    "or a map-style data set"
)


def subset(dataset: Any, indices: Sequence[int]) -> Any:
    """The samples at `indices` (ascending), as what a loader takes: `dataset.select(indices)` of a
    `datasets.Dataset`, a torch `IterableDataset` of a stream, which is read anew in each pass, else a torch `Subset`.
    """
    if is_stream(dataset):
        return Kept(dataset, indices)
    if hasattr(dataset, "select") and hasattr(dataset, "column_names"):  # datasets.Dataset
        return dataset.select(indices, keep_in_memory=True)
    return Subset(dataset, indices)


def rows_at(dataset: Any, indices: Iterable[int]) -> Any:
    """What gives the samples at `indices`: the data itself, or of a stream these rows, from one pass."""
    if not is_stream(dataset):
        return dataset
    places = sorted(indices)
    return dict(zip(places, Kept(dataset, places), strict=True))


def loads(loader: Any, dataset: Any) -> bool:
    """Whether a loader is of these samples, as far as it tells."""
    found = getattr(loader, "dataset", dataset)
    if isinstance(dataset, Kept):  # perhaps shared out by accelerate
        return found is dataset or getattr(found, "dataset", None) is dataset
    return len(found) == len(dataset)
