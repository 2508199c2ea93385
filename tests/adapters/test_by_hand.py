"""Backwards written by hand: of frozen tensors, beside hooks and other adapters, under transforms; and their length."""

from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import peftx
from peftx.adapters.mixed import by_adapter
from peftx.adapters.products import product

pytestmark = pytest.mark.filterwarnings("ignore:The ranks of the TriAdaptLoRA adapter")

TINY = {"phm_dim": 2, "reduction_factor": 2}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "allora": (peftx.ALLoRAConfig, {"r": 3}),
    "compacter": (peftx.CompacterConfig, TINY),
    "compacter of rank 2": (peftx.CompacterConfig, {**TINY, "phm_rank": 2}),
    "compacter without biases": (peftx.CompacterConfig, {**TINY, "phm_bias": False}),
    "gradnormlorp": (peftx.GradNormLoRPConfig, {"r": 3}),
    "gradnormlorp-full": (peftx.GradNormLoRPConfig, {"r": 3, "norm_grad": "full"}),
    "triadaptlora": (peftx.TriAdaptLoRAConfig, {"init_r": 3, "target_r": 4}),
    "triadaptlora at its largest rank": (peftx.TriAdaptLoRAConfig, {"init_r": 4, "target_r": 4, "max_rank": 4}),
}
OWN = [name for name in CONFIGS if name.startswith(("compacter", "triadaptlora"))]
JOINED = ["allora", "gradnormlorp", "triadaptlora"]  # whose base layer's gradient is taken with the adapter's


def adapted(name: str, names: tuple[str, ...] = ("default",), **kwargs: Any) -> Any:
    """Two layers with trained adapters, in float64 and in training mode; all adapters are active."""
    torch.manual_seed(0)
    config, options = CONFIGS[name]
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    model: Any = peft.get_peft_model(base, config(target_modules=["0", "2"], **options, **kwargs), names[0])
    for other in names[1:]:
        model.add_adapter(other, config(target_modules=["0", "2"], **options))
    model.base_model.set_adapter(list(names))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.train()


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    x = inputs().requires_grad_()
    model.zero_grad()
    model(x).sin().sum().backward()
    return [tensor.grad for tensor in (x, *model.parameters())]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_frozen_tensor_has_no_gradient_and_changes_no_other(name: str) -> None:
    model = adapted(name)
    whole = gradients(model)
    for i, parameter in enumerate(model.parameters(), 1):
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            wanted = [None if j == i else tensor for j, tensor in enumerate(whole)]
            torch.testing.assert_close(gradients(model), wanted)
            parameter.requires_grad_(True)


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("where", ["alone", "two", "hook", "backward hook", "trained bias", "eval"])
def test_the_input_has_the_gradient_of_the_base_and_the_adapter(name: str, where: str) -> None:
    model = adapted(name, ("a", "b") if where == "two" else ("default",))
    base, seen = model.base_model.model[2].base_layer, []
    if where == "hook":
        base.register_forward_hook(lambda module, args, output: output.sin())
    elif where == "backward hook":
        base.register_full_backward_pre_hook(lambda module, g: seen.append(g))
    elif where == "trained bias":
        base.bias.requires_grad_()
    x = inputs().requires_grad_()
    assert torch.autograd.gradcheck(model.train(where != "eval"), x)
    assert bool(seen) == (where == "backward hook")
    model(x).sum().backward()
    assert (base.bias.grad is not None) == (where == "trained bias")


@pytest.mark.parametrize("name", OWN)
def test_transforms_of_torch_func_differentiate_them(name: str) -> None:
    model, x = adapted(name), inputs()
    tensors = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    def loss(tensors: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return functional_call(model, tensors, (sample,)).sin().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(tensors, x)
    model(x).sin().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(each[key].sum(0), parameter.grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_derivative_is_refused(name: str) -> None:
    model, x = adapted(name), inputs().requires_grad_()
    (first,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_row_of_zeros_is_not_rescaled_whatever_its_magnitude() -> None:
    model = adapted("gradnormlorp")
    layer, x = model.base_model.model[0], inputs()
    layer.base_layer.weight.data[2], layer.lora_B["default"].weight.data[2] = 0, 0
    y = layer(x)
    assert torch.equal(y[..., 2], layer.base_layer.bias[2].expand(2, 5))
    y.square().sum().backward()
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.grad[2] == 0 and (magnitude.grad[:2] != 0).all() and layer.lora_B["default"].weight.grad[2].any()


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_a_quantised_layer_follows_a_change_in_place_between_evaluations(part: str) -> None:
    base = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 32).to("cpu")
    model: Any = peft.get_peft_model(nn.Sequential(base), peftx.GradNormLoRPConfig(target_modules=["0"])).eval()
    layer, x = model.base_model.model[0], torch.randn(4, 64)
    layer.lora_B["default"].weight.data.normal_()
    with torch.no_grad():
        before = model(x)
        getattr(layer, part)["default"].weight.data.mul_(2)
        after = model(x)
        layer.lora_variant["default"]._cross = None
        assert torch.equal(model(x), after) and not torch.allclose(before, after)


@pytest.mark.parametrize("names", ["aabbb", "ababb", "bbbbb", "bxaxb"])
def test_rows_of_a_mixed_batch_keep_their_order_and_gradients(names: str) -> None:
    x = torch.randn(len(names), 2, 3, dtype=torch.float64, requires_grad=True)
    factors, asked = {"a": 2.0, "b": -3.0}, []

    def adapt(name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        asked.append((name, len(x)))
        return result + factors.get(name, 0.0) * x

    y = by_adapter(names, adapt, x, x.detach().sin())
    scale = torch.tensor([factors.get(name, 0.0) for name in names], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(y, x.sin() + scale * x)
    assert sorted(asked) == sorted((name, names.count(name)) for name in set(names))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], scale.expand_as(x))
    assert by_adapter("", adapt, x[:0], x[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_product_is_scaled_and_written_into_a_part(scale: float, dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    whole = torch.full((5, 6), torch.nan, dtype=dtype)
    product(a, b, scale, into=whole[1:4, 2:4])
    torch.testing.assert_close(whole[1:4, 2:4], (scale * (a @ b)).to(dtype))
    assert whole.isnan().sum() == 30 - 6
    torch.testing.assert_close(product(a, b, scale), scale * (a @ b))


class Count(TorchDispatchMode):
    """Counts operations that are neither views nor allocations."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [argument.alias_info for argument in func._schema.arguments]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        self.total += not view and not any(
            word in func._schema.name for word in ("empty", "detach", "view", "promote_types")
        )
        return func(*args, **(kwargs or {}))


# Forward and backward of one layer, the base layer's 2 included; PEFT's LoRA has 12, its DoRA 32.
@pytest.mark.parametrize(
    "name, most",
    [
        ("allora", 18),
        ("triadaptlora", 17),
        ("triadaptlora at its largest rank", 16),
        ("compacter", 28),
        ("gradnormlorp", 28),
        ("gradnormlorp-full", 42),
    ],
)
def test_a_layer_has_few_operations(name: str, most: int) -> None:
    config, options = CONFIGS[name]
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 8, bias=False)), config(target_modules=["0"], **options))
    x, g = torch.randn(5, 6, requires_grad=True), torch.ones(5, 8)
    with Count() as count:
        model(x).backward(g)
    assert count.total <= most


def slopes(model: nn.Module, steps: float = 1e-6) -> torch.Tensor:
    """The gradient of the input by differences."""
    x, found = inputs(), torch.zeros(inputs().numel(), dtype=torch.float64)
    for i in range(x.numel()):
        for sign in (1, -1):
            moved = x.flatten().clone()
            moved[i] += sign * steps
            torch.manual_seed(5)
            found[i] += sign * model(moved.view_as(x)).sin().sum().item() / (2 * steps)
    return found.view_as(x)


def twice(*args: Any) -> Any:
    """A hook of any kind before or behind a module: what it passes on is doubled."""
    value = args[-1]
    return tuple(2 * part if part is not None else None for part in value) if isinstance(value, tuple) else 2 * value


HOOKED = {
    "before the adapter": lambda model: adapter_of(model).register_forward_pre_hook(
        lambda module, args: (2 * args[0], *args[1:])
    ),
    "behind the adapter": lambda model: adapter_of(model).register_forward_hook(
        lambda module, args, output: args[1] + (output - args[1]) / 2
    ),
    "behind its dropout": lambda model: dropout_of(model).register_forward_hook(twice),
    "behind all": lambda model: nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if module is model.base_model.model[0].base_layer else None
    ),
}


def adapter_of(model: Any) -> nn.Module:
    layer = model.base_model.model[0]
    return layer.adapters["default"] if hasattr(layer, "adapters") else layer.lora_B["default"]


def dropout_of(model: Any) -> nn.Module:
    layer = model.base_model.model[0]
    return layer.lora_dropout["default"] if hasattr(layer, "lora_dropout") else layer


@pytest.mark.parametrize("hook", HOOKED)
@pytest.mark.parametrize("name", ["triadaptlora", "allora"])
def test_a_hook_changes_gradients_as_it_changes_outputs(name: str, hook: str) -> None:
    model = adapted(name)
    if "the adapter" in hook and name == "allora":
        pytest.skip("LoRA's kin have no adapter that is called")
    handle = HOOKED[hook](model)
    try:
        torch.testing.assert_close(gradients(model)[0], slopes(model), rtol=1e-6, atol=1e-6)
    finally:
        handle.remove()


def test_dropout_that_is_switched_on_alone_drops_in_the_gradient_too() -> None:
    model = adapted("allora", lora_dropout=0.5).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(5)
    x = inputs().requires_grad_()
    model(x).sin().sum().backward()
    torch.testing.assert_close(x.grad, slopes(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 6)])
def test_nothing_in_gives_nothing_and_gradients_of_zero(name: str, shape: tuple[int, ...]) -> None:
    model, x = adapted(name), torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert all((p.grad is None or not p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_can_be_changed_in_place(name: str) -> None:
    found = []
    for change in (torch.relu_, torch.relu):
        model = adapted(name)
        x = inputs().requires_grad_()
        change(model.base_model.model[0](x)).square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", OWN)
def test_other_modes_of_differentiation(name: str) -> None:
    model = adapted(name)
    x = inputs()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(x).sin().sum(dim=(0, 1))

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        forward = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    one = x.clone().requires_grad_()
    rows = torch.autograd.grad(loss(one), one, torch.eye(4, dtype=x.dtype), is_grads_batched=True)[0]
    single = torch.stack([torch.autograd.grad(loss(one)[i], one)[0] for i in range(4)])
    torch.testing.assert_close(rows, single)
    torch.testing.assert_close(forward, single.sum(dim=(1, 2, 3)))


def test_an_adapter_that_is_active_twice_acts_twice() -> None:
    model = adapted("allora")
    model.base_model.set_adapter(["default", "default"])
    torch.testing.assert_close(gradients(model)[0], slopes(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", [None, ["default", "other", "__base__"]])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6)])
def test_bat_takes_nothing_too(names: list[str] | None, shape: tuple[int, ...]) -> None:
    config = peftx.BoneConfig(r=2, init_weights="bat", target_modules=["0"])
    model: Any = peft.get_peft_model(nn.Sequential(nn.Linear(6, 8)), config)
    model.add_adapter("other", config)
    if names is not None:
        names = names[: shape[0]]
    with peftx.inference(model):
        y = model(torch.zeros(shape), **({"adapter_names": names} if names else {}))
    assert y.shape == (*shape[:-1], 8)
