"""Two processes (gloo, CPU) train every method on half a batch each, through accelerate; one process on all of it."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from conftest import CASES, Case, adapted, randomize, tiny_model
from processes import join, leave

STEPS = 2


class Outcome(NamedTuple):
    """What one process saw; tensors by the name of the parameter."""

    gradients: dict[str, torch.Tensor]  # of the first step, as the optimizer got them
    parameters: dict[str, torch.Tensor]  # after the last step


def batch(step: int) -> torch.Tensor:
    return torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(step))


def train(case: Case, checkpointing: bool, accelerator: Accelerator | None = None) -> Outcome:
    """Two steps of SGD on this process's rows of each batch."""
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    model = adapted(tiny_model("llama"), case, target_modules="all-linear").train()
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    if rank:
        randomize(model, case, seed=9)  # the first process's adapter counts
    model.config.use_cache = False
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=0.05)
    forward = model
    if accelerator:
        forward, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        rows = batch(step)[rank::world_size]
        loss = forward(input_ids=rows, labels=rows).loss
        accelerator.backward(loss) if accelerator else loss.backward()
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in named.items()}
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(gradients, {name: parameter.detach() for name, parameter in named.items()})


def process(rank: int, folder: Path) -> None:
    join(rank, folder)
    accelerator = Accelerator(cpu=True)
    outcomes = {(case.name, mode): tuple(train(case, mode, accelerator)) for case in CASES for mode in (False, True)}
    torch.save(outcomes, folder / str(rank))
    leave()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the two processes saw, by method and checkpointing."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(process, args=(folder,), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames gradient checkpointing
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_two_processes_train_as_one(case: Case, outcomes: list[dict], checkpointing: bool) -> None:
    first, second = (Outcome(*outcome[case.name, checkpointing]) for outcome in outcomes)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    wanted = train(case, checkpointing)
    assert all(gradient.any() for gradient in wanted.gradients.values())
    torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-6)
    start = dict(adapted(tiny_model("llama"), case, target_modules="all-linear").named_parameters())
    moved = [name for name, parameter in first.parameters.items() if not torch.equal(parameter, start[name])]
    assert len(moved) > len(first.parameters) / 2
