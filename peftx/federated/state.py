"""What is sent between clients and server, and what a server computes from it. Torch and PEFT only.

A state is a dict of fp32 tensors on the CPU by "<layer's name in the base model>.lora_A" (r, d_in) and "....lora_B"
(d_out, r). Where no other source is given, the algorithms are those of FedSVD (arXiv:2505.12805) and the baselines that
its authors compare with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..tuners.fedsvd import check_unmerged, factored_svd, factors_of, linear_layers, refactorize
from .checks import SKEW, skewness

State = dict[str, torch.Tensor]
Factors = Literal["A", "B", "AB"]
Weighting = Literal["examples", "uniform"]
Reply = tuple[int, Mapping[str, torch.Tensor]]  # number of examples, and the client's tensors
Product = dict[str, tuple[torch.Tensor, torch.Tensor]]  # B (d_out, k) and A (k, d_in) by layer


# Models


def _parameters(layers: Mapping[str, LoraLayer], adapter_name: str, factors: str) -> dict[str, nn.Parameter]:
    """The parameters that are sent, by their keys."""
    if factors not in ("A", "B", "AB"):
        raise ValueError(f"`factors` must be 'B', 'A' or 'AB', got {factors!r}.")
    return {
        f"{name}.lora_{which}": parameter
        for name, layer in layers.items()
        for which, parameter in zip("AB", factors_of(layer, adapter_name), strict=True)
        if which in factors
    }


def client_state(model: nn.Module, adapter_name: str = "default", factors: Factors = "B") -> State:
    """What a client sends: copies of its trained factors.

    Args:
        model: a `PeftModel`, its tuner, or a transformers model with adapters; FedSVD or any other method that is LoRA.
        adapter_name: which adapter.
        factors: `"B"` for FedSVD and FFA-LoRA, `"AB"` for methods that train both.

    Raises:
        ValueError: no such adapter, or it is no plain LoRA of linear layers.
    """
    parameters = _parameters(linear_layers(model, adapter_name), adapter_name, factors)
    return {key: p.detach().to("cpu", torch.float32, copy=True).contiguous() for key, p in parameters.items()}


def global_state(model: nn.Module, adapter_name: str = "default") -> State:
    """What a server holds and sends: A and B of every layer; see `client_state`."""
    return client_state(model, adapter_name, "AB")


@torch.no_grad()
def load_global(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    *,
    factors: Factors = "AB",
    orthonormal: bool = False,
) -> None:
    """Copies a state into the model's parameters, all of it or, after an error, nothing. The state is not trusted.

    Args:
        model: see `client_state`.
        state: A and B of every layer.
        adapter_name: which adapter; it must not be merged.
        factors: what the state consists of: `"B"` where A is sent in other messages.
        orthonormal: also check that A has orthonormal rows, max |A A^T - I| <= 1e-3, as after a refactorisation.

    Raises:
        ValueError: missing or unexpected keys, wrong shapes, another dtype than fp32, values that are not finite, rows
            that are not orthonormal; the first ten are listed.
    """
    layers = linear_layers(model, adapter_name)
    check_unmerged(layers, adapter_name)
    parameters = _parameters(layers, adapter_name, factors)
    problems = find_problems(state, {key: parameter.shape for key, parameter in parameters.items()})
    if not problems:
        values = {key: state[key].to(parameter.device, parameter.dtype) for key, parameter in parameters.items()}
        problems = [f"{key}: overflows {v.dtype}" for key, v in values.items() if not torch.isfinite(v).all()]
        if orthonormal:
            problems += [
                f"{key}: its rows are not orthonormal, max |A A^T - I| = {error:.1g}"
                for key, value in state.items()
                if key.endswith(".lora_A") and (error := skewness(value)) > SKEW
            ]
    _refuse(problems, "The state does not fit the model, nothing was loaded")
    for key, parameter in parameters.items():
        parameter.copy_(values[key])


def find_problems(state: Any, shapes: Mapping[str, Iterable[int]]) -> list[str]:
    """What keeps `state` from being finite fp32 tensors of exactly these keys and shapes; a line each."""
    if not isinstance(state, Mapping):
        return [f"expected a dict of tensors, got {type(state).__name__}"]
    problems = [f"{key}: missing" for key in shapes if key not in state]
    for key, value in state.items():
        if key not in shapes:
            problems.append(f"{key}: unexpected")
        elif not isinstance(value, torch.Tensor):
            problems.append(f"{key}: found {type(value).__name__}, expected a tensor")
        elif value.shape != (wanted := torch.Size(shapes[key])):
            problems.append(f"{key}: found shape {tuple(value.shape)}, expected {tuple(wanted)}")
        elif value.dtype != torch.float32:
            problems.append(f"{key}: found dtype {value.dtype}, expected torch.float32")
        elif not torch.isfinite(value).all():
            problems.append(f"{key}: found values that are not finite (NaN or infinite)")
    return problems


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{what}:\n  " + "\n  ".join(problems[:10]) + more)


@torch.no_grad()
def fold(model: nn.Module, product: Product, adapter_name: str = "default") -> None:
    """Adds s B A of each layer to its base weight, s the adapter's scale, as FedEx-LoRA and FLoRA ask for.

    The base weight is written in its own dtype, and kept nowhere. After an error nothing is written.

    Args:
        model: see `client_state`.
        product: B (d_out, k) and A (k, d_in), any k, by the layer's name in the base model.
        adapter_name: whose scale is used; it must not be merged.

    Raises:
        ValueError: an unknown layer, wrong shapes, values that are not finite, or a quantised base weight.
    """
    layers: dict[str, Any] = linear_layers(model, adapter_name)
    check_unmerged(layers, adapter_name)
    problems = []
    for name, (B, A) in product.items():
        layer: Any = layers.get(name)
        base = layer and layer.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)) or not base.weight.is_floating_point():
            problems.append(f"{name}: not an adapted, unquantised linear layer")
        elif B.ndim != 2 or A.ndim != 2 or (len(B), *A.shape) != (layer.out_features, B.shape[1], layer.in_features):
            problems.append(f"{name}: found shapes {tuple(B.shape)} and {tuple(A.shape)}")
        elif not torch.isfinite(_folded(base, layer.scaling[adapter_name], B, A)).all():
            problems.append(f"{name}: the weight would have values that are not finite")
    _refuse(problems, "The product does not fit the model, nothing was folded in")
    for name, (B, A) in product.items():  # made again, so that one new weight exists at a time
        base = layers[name].get_base_layer()
        base.weight.copy_(_folded(base, layers[name].scaling[adapter_name], B, A))


def _folded(base: Any, scale: float, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """The weight of a base layer plus s B A, in the layer's layout and dtype."""
    delta = scale * B.to(base.weight.device) @ A.to(base.weight.device)
    return (base.weight + (delta.T if isinstance(base, Conv1D) else delta)).to(base.weight.dtype)


# The server


def refactorize_state(state: Mapping[str, torch.Tensor]) -> tuple[State, State]:
    """Refactorises every layer of a state; see `refactorize`. For a server, which has no model.

    Returns:
        The new state, and the singular values of B A (r,), descending, by layer.

    Raises:
        ValueError: a factor without its other half, or factors that cannot be refactorised; the layer is named.
    """
    turned, values = dict(state), {}
    for name in layer_names(state):
        try:
            A, B = refactorize(state[f"{name}.lora_A"], state[f"{name}.lora_B"])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        turned[f"{name}.lora_A"], turned[f"{name}.lora_B"] = A, B
        values[name] = torch.linalg.vector_norm(B, dim=0)
    return turned, values


def layer_names(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The layers of a state of A and B, in its order.

    Raises:
        ValueError: other keys than the two factors of each layer.
    """
    names = [key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")]
    wanted = {f"{name}.lora_{which}" for name in names for which in "AB"}
    _refuse(
        [f"{key}: unexpected, or without its other factor" for key in state if key not in wanted]
        + [f"{key}: missing" for key in sorted(wanted - state.keys())],
        "Expected lora_A and lora_B of each layer",
    )
    return names


def average_B(
    global_state: Mapping[str, torch.Tensor], replies: Iterable[Reply], weighting: Weighting = "examples"
) -> State:
    """The server's step of FedSVD and FFA-LoRA: the weighted mean of the clients' B.

    As all clients share A, this averages their products B A exactly. It equals the reference's B + sum w_k (B_k - B).
    Replies are taken one at a time and summed in fp64: memory is that of two states, and their order is irrelevant.

    Args:
        global_state: what was sent to the clients; says which tensors are expected.
        replies: pairs of the number of examples and B of each layer.
        weighting: `"examples"`: w_k = n_k / sum n. `"uniform"`: all equal (the reference's `balanced`), and the
            numbers are not looked at: under differential privacy they would tell something.

    Returns:
        B of each layer, fp32.

    Raises:
        ValueError: no replies, a number of examples that is not a positive int, or tensors that do not fit.
    """
    return _average(_shapes(global_state, "B"), replies, weighting)


def average_AB(
    global_state: Mapping[str, torch.Tensor], replies: Iterable[Reply], weighting: Weighting = "examples"
) -> State:
    """The server's step of FedIT (arXiv:2305.05644): the weighted means of the clients' A and of their B.

    Their product is not the mean of the clients' products. Arguments and errors as `average_B`.
    """
    return _average(_shapes(global_state, "AB"), replies, weighting)


def flexlora(
    global_state: Mapping[str, torch.Tensor], replies: Iterable[Reply], weighting: Weighting = "examples"
) -> State:
    """The server's step of FlexLoRA (arXiv:2402.11505): the best factors of rank r of sum w_k B_k A_k.

    From the stacked factors, never the dense product: O((d_in + d_out) K r) memory for K replies. The singular values
    go into B, as in FedSVD; how the authors split them was not checked. Arguments and errors as `average_B`.
    """
    state: State = {}
    for name, (B, A) in flora(global_state, replies, weighting).items():
        r = len(global_state[f"{name}.lora_A"])
        U, S, Vh = factored_svd(A.double(), B.double())
        A, B = refactorize(Vh[:r], U[:, :r] * S[:r])  # for its signs
        state |= {f"{name}.lora_A": A.float(), f"{name}.lora_B": B.float()}
    return state


def fedex_lora(
    global_state: Mapping[str, torch.Tensor], replies: Iterable[Reply], weighting: Weighting = "examples"
) -> tuple[State, Product]:
    """The server's step of FedEx-LoRA (arXiv:2410.09432): FedIT's means, and what their product lacks.

    The residual sum w_k B_k A_k - (sum w_k B_k)(sum w_k A_k) is the covariance sum w_k (B_k - B)(A_k - A). It comes as
    factors of rank K r for K replies, not as the authors' dense matrix, and every client and the server add it to their
    base weights by `fold`. Where all A are equal it is zero. Arguments and errors as `average_B`.
    """
    weights, stacked = _stack(global_state, replies, weighting)
    state: State = {}
    residual: Product = {}
    for name, (B, A) in stacked.items():
        mean_B, mean_A = (torch.tensordot(weights, factor, 1) for factor in (B, A))
        state |= {f"{name}.lora_A": mean_A.float(), f"{name}.lora_B": mean_B.float()}
        residual[name] = _joined(weights, B - mean_B, A - mean_A)
    return state, residual


def flora(
    global_state: Mapping[str, torch.Tensor], replies: Iterable[Reply], weighting: Weighting = "examples"
) -> Product:
    """The server's step of FLoRA's stacking (arXiv:2409.05976): sum w_k B_k A_k as factors of rank K r for K replies.

    Every client and the server add it to their base weights by `fold`, and start anew with B = 0 and fresh A. Arguments
    and errors as `average_B`.
    """
    weights, stacked = _stack(global_state, replies, weighting)
    return {name: _joined(weights, B, A) for name, (B, A) in stacked.items()}


def _shapes(state: Mapping[str, torch.Tensor], factors: str) -> dict[str, torch.Size]:
    return {f"{name}.lora_{f}": state[f"{name}.lora_{f}"].shape for name in layer_names(state) for f in factors}


def _checked(
    shapes: Mapping[str, torch.Size], replies: Iterable[Reply], weighting: str
) -> Iterable[tuple[int, Mapping[str, torch.Tensor]]]:
    """The replies with their weights, not normalised; refuses those that do not fit."""
    if weighting not in ("examples", "uniform"):
        raise ValueError(f"`weighting` must be 'examples' or 'uniform', got {weighting!r}.")
    index = -1
    for index, (examples, tensors) in enumerate(replies):
        weight = 1 if weighting == "uniform" else examples
        if isinstance(weight, bool) or not isinstance(weight, int) or weight < 1:
            raise ValueError(f"Reply {index}: the number of examples must be a positive int, got {weight!r}.")
        _refuse(find_problems(tensors, shapes), f"Reply {index} does not fit")
        yield weight, tensors
    if index < 0:
        raise ValueError("There is no reply to average.")


@torch.no_grad()
def _average(shapes: Mapping[str, torch.Size], replies: Iterable[Reply], weighting: str) -> State:
    sums = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
    total = 0
    for weight, tensors in _checked(shapes, replies, weighting):
        total += weight
        for key, running in sums.items():
            running.add_(tensors[key], alpha=weight)
    return {key: running.div_(total).float() for key, running in sums.items()}


@torch.no_grad()
def _stack(state: Mapping[str, torch.Tensor], replies: Iterable[Reply], weighting: str) -> tuple[torch.Tensor, Product]:
    """The normalised weights (K,), and B (K, d_out, r) and A (K, r, d_in) of each layer, fp64."""
    checked = list(_checked(_shapes(state, "AB"), replies, weighting))
    weights = torch.tensor([weight for weight, _ in checked], dtype=torch.float64)
    stacked = {
        name: tuple(torch.stack([tensors[f"{name}.lora_{f}"].double() for _, tensors in checked]) for f in "BA")
        for name in layer_names(state)
    }
    return weights / weights.sum(), stacked  # type: ignore[return-value]


def _joined(weights: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B (d_out, K r) and A (K r, d_in), fp32, with B A = sum w_k B_k A_k."""
    return (weights[:, None, None] * B).transpose(0, 1).flatten(1).float(), A.flatten(0, 1).float()


def joined(residual: Mapping[str, torch.Tensor], new: Product) -> State:
    """FedEx-LoRA's residuals of all rounds so far, as "<layer>.residual_B" (d_out, k) and "....residual_A" (k, d_in).

    Their ranks add up round by round, until a layer's shorter side bounds them.
    """
    factors: State = {}
    for name, (B, A) in new.items():
        keys = (f"{name}.residual_B", f"{name}.residual_A")
        if keys[0] in residual:
            B, A = torch.cat([residual[keys[0]], B], 1), torch.cat([residual[keys[1]], A])
        if len(A) > min(len(B), A.shape[1]):
            U, S, A = factored_svd(A.double(), B.double())
            B = U * S
        factors |= {keys[0]: B.float(), keys[1]: A.float()}
    return factors
