"""Products and casts that both families of methods use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def accumulate(result: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`result + scale * h @ weight` as one product, without a further pass over `result`.

    Shapes: result (..., n), h (..., r), weight (r, n). The sum has result's dtype.
    """
    if would_round(result):
        return result + (scale * (h @ weight)).to(result.dtype)
    h, weight = h.to(result.dtype), weight.to(result.dtype)
    if torch.is_grad_enabled():  # whose products take their layout from that of `weight`; row-major is up to 3x faster
        weight = weight.contiguous()
    flat = result.reshape(-1, result.shape[-1])
    # as no view: what a function of autograd returns as one cannot be changed in place
    return torch.ops.aten._unsafe_view(torch.addmm(flat, h.reshape(-1, h.shape[-1]), weight, alpha=scale), result.shape)


def product(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, into: torch.Tensor | None = None) -> torch.Tensor:
    """`scale * a @ b` of two matrices as one operation; `into` gets it, in its own dtype, if given."""
    if into is not None and into.dtype == a.dtype:
        return into.addmm_(a, b, beta=0, alpha=scale)
    found = a @ b if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)
    return found if into is None else into.copy_(found)


def times(B: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """diag(`scale`) B, row-major; `scale` is a number or (out_features,)."""
    rows = scale[:, None].to(B.dtype) if isinstance(scale, torch.Tensor) else scale
    if isinstance(rows, float | int) and rows == 1:
        return B.contiguous()
    return torch.mul(B, rows, out=torch.empty_like(B, memory_format=torch.contiguous_format))


def base_weight(base: nn.Module, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor | None:
    """The base layer's weight, where its output `result` for `x` hides no backward but that of their product.

    Such a result needs no backward of its own: the gradients that x has from it and from an adapter are one sum, made
    by `input_gradient`, and it can be detached.
    """
    wanted = by_hand() and x.requires_grad and result.requires_grad
    if not (wanted and type(base) is nn.Linear and unobserved(base)):
        return None
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    same = x.dtype == result.dtype == base.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    plain = type(base.weight) in (nn.Parameter, torch.Tensor)  # of another type it may know no product but the layer's
    return base.weight if same and plain and not trained else None


def input_gradient(
    g: torch.Tensor, inner: torch.Tensor, down: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """The gradient `inner @ down` of an adapter's input; with that of the base layer, `g @ weight`, if it is given."""
    return inner @ down if weight is None else (g @ weight).addmm_(inner, down)


def by_hand() -> bool:
    """Whether a backward written by hand is of use: gradients are wanted, and by no transform of `torch.func`, no
    forward-mode differentiation and no compiler, which make their own."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not transformed() and forward_ad._current_level < 0


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()


def autocasted(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype in which autocast takes products, where it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def uncast(tensor: torch.Tensor) -> AbstractContextManager:
    """While active, autocast is off on the tensor's device."""
    device = tensor.device.type  # entering costs as much as a small product, so only where there is something to do
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def would_round(result: torch.Tensor) -> bool:
    """Whether autocast would round `result` in a product that adds to it."""
    device = result.device.type
    return torch.is_autocast_enabled(device) and result.dtype != torch.get_autocast_dtype(device)


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, in fp32 where its own dtype is narrower."""
    if tensor.dtype == torch.float32:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied where it lies in memory as tensors of a file do, anywhere: products round as operands lie."""
    if torch.compiler.is_compiling() or (tensor.is_contiguous() and tensor.data_ptr() % 64 == 0):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def kept(owner: Any, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns; made once where `owner.kept` is a dictionary, as within `peftx.inference`."""
    if owner.kept is None or torch.is_grad_enabled():
        return make()
    if key not in owner.kept:
        owner.kept[key] = make()
    return owner.kept[key]


def unobserved(module: nn.Module) -> bool:
    """Whether nobody would notice if the module's parameters were used without calling it."""
    return not (
        _has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def onloaded(*modules: nn.Module) -> AbstractContextManager:
    """While active, the modules' own tensors are where they are computed with, also those that accelerate offloads."""
    away = [module for module in modules if hasattr(module, "_hf_hook") and is_away(module)]
    if not away:
        return nullcontext()
    stack = ExitStack()
    for module in away:
        stack.enter_context(align_module_device(module))
    return stack


def is_away(module: nn.Module) -> bool:
    return any(
        tensor is not None and tensor.is_meta for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def unpack(base_layer: Any) -> None:
    """Restores the usual layout of a 4-bit weight that bitsandbytes laid out anew; others are left alone.

    On CPUs with AVX512-BF16 it does so at the first evaluation; read or trained in that layout the weight is noise.
    """
    # `state_dict()` restores the usual layout in place, except that the scales of a weight without double quantisation
    # stay transposed. Each round costs precision, so this one is the last.
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base_layer.state_dict()
        base_layer.support_avx512bf16_for_cpu = False
        state = base_layer.weight.quant_state
    if state is not None and not getattr(state, "packing_format_for_cpu", False) and state.absmax.ndim == 2:
        state.absmax = state.absmax.T.reshape(-1).float()
