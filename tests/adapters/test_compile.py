"""`torch.compile(fullgraph=True)`: no graph break in any method, and the same numbers."""

import copy

import pytest
import torch
from conftest import MLP, Case, adapted, logits, tiny_model
from torch import nn

TARGETS = ["lin0", "lin1"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "eager") -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.slow
def test_a_transformer_is_one_graph(case: Case, tokens: torch.Tensor) -> None:
    model = tiny_model("gpt2")
    del model.transformer.h[1]  # tracing takes most of the time
    model = adapted(model, case, target_modules="all-linear")
    model.config.use_cache = False
    torch.testing.assert_close(logits(compiled(model), tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_compiled_training_equals_eager_training(case: Case, mlp: MLP) -> None:
    x, y = torch.randn(6, 12), torch.randint(4, (6,))
    eager = adapted(mlp, case, target_modules=TARGETS).train()
    twin = copy.deepcopy(eager)
    run = compiled(twin, "aot_eager")
    for model in (eager, run):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(twin.state_dict(), eager.state_dict(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_switching_disabling_and_merging_are_seen(case: Case, mlp: MLP) -> None:
    x = torch.randn(6, 12)
    plain = mlp(x)
    model = adapted(mlp, case, "first", "second", target_modules=TARGETS)
    run = compiled(model)
    second = run(x)
    model.set_adapter("first")
    first = run(x)
    torch.testing.assert_close(first, model(x))
    assert not torch.allclose(first, second, atol=1e-4)
    model.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(run(x), model(x))
    with model.disable_adapter():
        assert torch.equal(run(x), plain)
    if case.info.mergeable:
        model.set_adapter("first")
        model.merge_adapter()
        torch.testing.assert_close(run(x), first, atol=1e-5, rtol=1e-5)


def test_autocast_is_one_graph(case: Case, mlp: MLP) -> None:
    x = torch.randn(6, 12)
    model = adapted(mlp, case, target_modules=TARGETS)
    run = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(x), model(x), atol=0.02, rtol=0.02)
