"""FSDP2 on two processes (gloo, CPU): every method trains as on one process, or refuses before its first step."""

from pathlib import Path

import pytest
import torch
from conftest import CASES, Case, adapted, tiny_model
from processes import join, leave

STEPS = 2


def refuses(case: Case) -> bool:
    return case.info.name in ("loraggpo", "triadaptlora")


def train(case: Case, sharded: bool) -> dict[str, torch.Tensor]:
    """Parameters after two steps of SGD on the same batch everywhere."""
    model = adapted(tiny_model("llama"), case, target_modules="all-linear").train()
    model.config.use_cache = False
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    rows = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if sharded else p).detach().clone() for name, p in found.items()}


def process(rank: int, folder: Path) -> None:
    join(rank, folder)
    outcomes = {}
    for case in CASES:
        try:
            outcomes[case.name] = train(case, sharded=True)
        except RuntimeError as error:
            outcomes[case.name] = str(error)
    torch.save(outcomes, folder / str(rank))
    leave()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("fsdp2")
    torch.multiprocessing.spawn(process, args=(folder,), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.slow
def test_sharded_processes_train_as_one_or_refuse(case: Case, outcomes: list[dict]) -> None:
    first, second = (outcome[case.name] for outcome in outcomes)
    if refuses(case):
        assert first == second and "cannot train sharded parameters" in first and "DDP" in first
        return
    assert isinstance(first, dict), first
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, train(case, sharded=False), rtol=1e-4, atol=1e-6)
