"""Products and casts that both families of methods use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn


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
    return torch.addmm(flat, h.reshape(-1, h.shape[-1]), weight, alpha=scale).view(result.shape)


def autocasted(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype in which autocast takes products, where it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def would_round(result: torch.Tensor) -> bool:
    """Whether autocast would round `result` in a product that adds to it."""
    device = result.device.type
    return torch.is_autocast_enabled(device) and result.dtype != torch.get_autocast_dtype(device)


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, in fp32 where its own dtype is narrower."""
    if tensor.dtype == torch.float32:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def kept(owner: Any, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns; made once where `owner.kept` is a dictionary, as within `peftx.inference`."""
    if owner.kept is None or torch.is_grad_enabled():
        return make()
    if key not in owner.kept:
        owner.kept[key] = make()
    return owner.kept[key]


def unobserved(module: nn.Module) -> bool:
    """Whether nobody would notice if the module's parameters were used without calling it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in module.__dict__


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
