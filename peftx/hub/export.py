"""Adapters of peftx as plain LoRA adapters, for everything that knows PEFT but not peftx."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, MissConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..adapters import plain
from ..adapters.experts import Routed, target_key
from ..adapters.files import belongs_to
from ..adapters.lora import Variant
from ..adapters.products import at_least_fp32
from ..cards import exported as cards
from ..files import drafted
from ..registry import info_of, methods
from ..tuners.bone import BoneConfig
from .loading import load_adapter, read_adapter
from .merged import BY, check_place
from .tensors import by_pattern, factors, mismatched, split

ADAPTER = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)

BLOCK = ".bone_adapter.block"  # the end of the key of a Bone tensor


def export_lora(
    model: PeftModel | str | os.PathLike,
    path: str | os.PathLike,
    adapter_name: str | None = None,
    rank: int | None = None,
    *,
    base_model: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> dict[str, float]:
    """Writes an adapter as a plain LoRA adapter, which stock PEFT and vLLM load, without peftx.

    Without `rank` the outputs stay equal. Methods that are LoRA with another training rule are written as they are,
    GradNormLoRP as PEFT's DoRA (`use_dora=True`). Others are written by the exact factors of their delta; modules whose
    ranks differ get a `rank_pattern`.

    With `rank` every delta, whatever the method, is replaced by its best approximation of that rank, from a singular
    value decomposition of the dense delta: O(out in min(out, in)) for each module, so minutes for a large model. This
    is for what has no exact form (Bone's bat) or is no plain LoRA (GradNormLoRP).

    Modules trained in full (`modules_to_save`, biases) go along. The training cannot be continued from the file as the
    method it was.

    Args:
        model: the `PeftModel`, which is not changed; or a saved adapter, a folder or an id on the Hub.
        path: folder for `adapter_config.json` and `adapter_model.safetensors`; made if missing.
        adapter_name: default: the active adapter.
        rank: at least 1; limited to the shorter side of each module. Default None, exact.
        base_model: of a saved adapter: a model, or where to find it; default: where the adapter's config says. Without
            `rank`, methods that are LoRA with another training rule need none.
        revision, subfolder: of a saved adapter: branch, tag or commit of its repository, and where in it.
        token: for the Hub; default: the one that `hf auth login` has stored.

    Returns:
        By the name of each adapted module, the error ||delta - B A|| / ||delta|| in the Frobenius norm; 0 if exact.

    Raises:
        TypeError: `model` is neither a `PeftModel` nor a path.
        ValueError: there is no such adapter, more than one is active and none was named, or `rank` is below 1; a saved
            adapter or its base model cannot be read; `path` is what is read, or a file, or has files in the way that
            are not an earlier export's.
        NotImplementedError: the adapter is no weight delta (Compacter), or has no exact LoRA form (Bone's bat,
            some convolutions; the latter none of a given rank either), or is one of PEFT's whose weight delta is not
            the whole of what it does (`rank` with DoRA or another variant, `lora_bias`, `target_parameters`), or is
            GradNormLoRP on experts, and no `rank` is given. Nothing is written then.
    """
    hub: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "token": token}

    own: list[Any] = []

    def check(config: Any) -> None:
        own.append(config)
        check_place(path, ADAPTER, config)

    saved = isinstance(model, (str, os.PathLike))
    if saved:
        check_place(path, (), None, base_model, Path(model, subfolder or ""))
    state, exported, errors = plain_lora(model, adapter_name, rank, check, base_model=base_model, **hub)
    _write(path, state, exported, own[-1], model if saved else None, max(errors.values(), default=0.0))
    return errors


def plain_lora(
    model: PeftModel | str | os.PathLike,
    adapter_name: str | None,
    rank: int | None,
    check: Callable[[Any], None],
    *,
    base_model: Any = None,
    **hub: Any,
) -> tuple[dict[str, torch.Tensor], LoraConfig, dict[str, float]]:
    """Tensors and config of the plain LoRA that an adapter is, and the error of each module; see `export_lora`.

    Args:
        check: is called with the adapter's own config, before the work.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"`rank` must be a whole number, at least 1, or None, got {rank!r}.")
    if isinstance(model, (str, os.PathLike)):
        config, state = read_adapter(model, **hub)
        check(config)
        _check_known(config)
        if rank is None and isinstance(config, LoraConfig):
            if bad := [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]:
                raise ValueError(
                    f"The adapter {model} has NaN or infinity in {bad[0]} and {len(bad) - 1} more tensors."
                )
            _check_factors(model, config, state)
            names = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in state if ".lora_" in key}
            return state, plain.config_of(config), dict.fromkeys(sorted(names), 0.0)
        model = load_adapter(model, base_model, **hub)
    elif not isinstance(model, PeftModel):
        raise TypeError(
            "export_lora needs a PeftModel, as `get_peft_model` returns it, or the folder of a saved adapter, got "
            f"{type(model).__name__}."
        )
    adapter_name = _chosen(model, adapter_name)
    config = model.peft_config[adapter_name]
    check(config)
    _check_known(config)
    state = _state_of(model, adapter_name)
    tuner: Any = model.base_model
    layers = {
        name: layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, tuner.tuner_layer_cls) and adapter_name in layer._all_available_adapter_names()
    }
    errors = dict.fromkeys(layers, 0.0)
    if rank is None and isinstance(config, LoraConfig):
        exported = plain.config_of(config)
        exported.fan_in_fan_out = all(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
        keyed = {f"base_model.model.{name}": layer for name, layer in layers.items()}
        return state | plain.rescaled(state, keyed, adapter_name), exported, errors
    if rank is None:
        factors = {name: layer.lora_factors(adapter_name) for name, layer in layers.items()}
    else:
        for layer in layers.values():
            _check_delta(config, layer, adapter_name)
        factors = {}
        for name, layer in tqdm(layers.items(), "approximating", leave=False, disable=None):
            *factors[name], errors[name] = _truncated(layer, adapter_name, rank)
    state = {key: tensor for key, tensor in state.items() if not belongs_to(key, tuner.prefix)}
    for name, layer in layers.items():
        state |= plain.tensors_of(f"base_model.model.{name}", layer, *factors[name])
    ranks = {target_key(layers[name], name): B.shape[-1] for name, (_, B) in factors.items()}
    return state, plain.describe(config, ranks, list(layers.values())), errors


def export_miss(
    model: PeftModel | str | os.PathLike,
    path: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Writes a Bone adapter as PEFT's MiSS, which computes the same, default and bat: stock PEFT loads it.

    Unlike plain LoRA, the training can be continued from it, and bat has this form too.

    Args:
        model: the `PeftModel`, which is not changed; or a saved adapter, a folder or an id on the Hub.
        path: folder for `adapter_config.json` and `adapter_model.safetensors`; made if missing.
        adapter_name: default: the active adapter.
        revision, subfolder, token: of a saved adapter, as for `export_lora`.

    Raises:
        TypeError: `model` is neither a `PeftModel` nor a path.
        ValueError: the adapter is no Bone, or has blocks of several sizes, which MiSS has no setting for; no such
            adapter; `path` as for `export_lora`.
    """
    if isinstance(model, (str, os.PathLike)):
        check_place(path, (), None, source=Path(model, subfolder or ""))
        config, state = read_adapter(model, revision=revision, subfolder=subfolder, token=token)
    elif isinstance(model, PeftModel):
        adapter_name = _chosen(model, adapter_name)
        config, state = model.peft_config[adapter_name], _state_of(model, adapter_name)
    else:
        raise TypeError(f"export_miss needs a PeftModel or the folder of a saved adapter, got {type(model).__name__}.")
    check_place(path, ADAPTER, config)
    if not isinstance(config, BoneConfig):
        raise ValueError(f"Only Bone adapters are MiSS adapters too, not {config.peft_type.value}.")
    if config.combined_rank:
        raise ValueError("A weighted sum of Bone adapters is a LoRA and no MiSS: write it by `export_lora`.")
    if isinstance(model, PeftModel):
        state |= _rescaled_blocks(model, state, adapter_name)
    current: Any = info_of(BoneConfig).model.current_key  # type: ignore[attr-defined]
    state = {current(key): tensor for key, tensor in state.items()}
    blocks = {key: tensor for key, tensor in state.items() if key.endswith(BLOCK)}
    if len(sizes := {tensor.shape[-1] if tensor.ndim == 3 else len(tensor) for tensor in blocks.values()}) > 1:
        raise ValueError(f"MiSS has one block size for all modules, this adapter has {sorted(sizes)} (`rank_pattern`).")
    bat = any(tensor.ndim == 3 for tensor in blocks.values())
    taken = {f.name for f in dataclasses.fields(MissConfig) if f.init} & {f.name for f in dataclasses.fields(config)}
    settings = {name: getattr(config, name) for name in taken - {"peft_type", "init_weights", "bias"}}
    bias = "MiSS_only" if config.bias.endswith("_only") else config.bias
    renamed = {key.replace(BLOCK, ".miss_block"): tensor for key, tensor in state.items()}
    exported = MissConfig(**settings, bias=bias, init_weights="bat" if bat else True)
    _write(path, renamed, exported, config, None if isinstance(model, PeftModel) else model)


def _state_of(model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
    """What PEFT would save of an adapter; its remark that adapted embeddings are saved whole is left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        return get_peft_model_state_dict(model, adapter_name=adapter_name)


def _rescaled_blocks(model: Any, state: dict[str, torch.Tensor], adapter_name: str | None) -> dict[str, Any]:
    """Bone's blocks times the scale that `scale_layer` or `set_scale` gave them: MiSS has no scale."""
    modules = model.base_model.model.named_modules()
    layers = {f"base_model.model.{name}{BLOCK}": layer for name, layer in modules}
    return {key: layers[key].adapters[adapter_name].scale * block for key, block in state.items() if key in layers}


def _write(
    path: str | os.PathLike,
    state: dict[str, torch.Tensor],
    config: Any,
    origin: Any,
    source: Any = None,
    error: float = 0.0,
) -> None:
    """The adapter and its card.

    Args:
        config: of what is written.
        origin: config of the adapter that it was.
        source: its folder or id.
        error: the largest of a module.
    """
    stock = {key.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector"): t for key, t in state.items()}
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in stock.items()}
    config.inference_mode = True
    with drafted(path, BY) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        kind: Any = "miss" if isinstance(config, MissConfig) else "dora" if config.use_dora else "lora"
        cards.put(folder, path, BY, kind, origin, source=source, error=error)


def numbers_in(config: LoraConfig) -> list[tuple[str, Any]]:
    """The ranks and alphas of single modules."""
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    return [(f"{name}: {key}", value) for name, part in patterns.items() for key, value in (part or {}).items()]


def _check_factors(shown: Any, config: LoraConfig, state: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless the tensors are those of a LoRA with the config's ranks."""
    for name, value in (("r", config.r), ("lora_alpha", config.lora_alpha), *numbers_in(config)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"The adapter {shown} cannot be exported: {name} in its config is {value!r}.")
    targets = config.target_modules or ()
    patterns = [rf"(.*\.)?({key})$" for key in (*(config.rank_pattern or ()), *(config.alpha_pattern or ()))]
    for pattern in (*patterns, *([targets] if isinstance(targets, str) else ())):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"The adapter {shown} cannot be exported: {pattern!r} is no pattern: {error}") from None
    modules, _ = split(state, "lora_")
    if not modules:
        raise ValueError(f"The adapter {shown} has no tensor of a LoRA.")
    for name, tensors in modules.items():
        if problems := mismatched(name, tensors):
            raise ValueError(f"The adapter {shown} cannot be exported: {problems[0]}")
        if not all(tensor.dtype.is_floating_point for tensor in tensors.values()):
            raise ValueError(f"The adapter {shown} cannot be exported: {name} has factors that are no floats.")
        named = isinstance(targets, str) or any(name == t or name.endswith(f".{t}") for t in targets)
        if targets and not named and not config.target_parameters:
            raise ValueError(f"The adapter {shown} cannot be exported: {name} is none of its target_modules.")
        A = factors(tensors)[0]
        r = by_pattern(config.rank_pattern, name, config.r)
        if A is not None and A.shape[0] != r and not config.target_parameters:
            raise ValueError(f"The adapter {shown} cannot be exported: {name} has rank {A.shape[0]}, its config {r!r}.")


def _check_known(config: Any) -> None:
    if config.peft_type != PeftType.LORA and not any(isinstance(config, info.config) for info in methods()):
        raise NotImplementedError(
            f"export_lora knows LoRA and peftx's methods, not {config.peft_type.value}. See `peft.convert_to_lora`."
        )


@torch.no_grad()
def _truncated(layer: Any, adapter_name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (rank, in_features, ...) and B (out_features, rank) nearest to the dense delta, and their relative error; over
    experts with a leading axis of those."""
    if isinstance(layer, Routed):
        found: Any = [_nearest(layer.dense_delta(adapter_name, expert), rank) for expert in range(layer.site.experts)]
        lost, norm = (math.hypot(*(one[i] for one in found)) for i in (2, 3))
        A, B = (torch.stack([one[i] for one in found]) for i in (0, 1))
        return A, B, lost / norm if norm else 0.0
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, _ConvNd) and base_layer.groups > 1:
        raise NotImplementedError("The delta of a convolution in groups cannot be exported with a given rank.")
    delta = at_least_fp32(layer.get_delta_weight(adapter_name))
    if isinstance(base_layer, (Conv1D, nn.Embedding)):
        delta = delta.T
    A, B, lost, whole = _nearest(delta.flatten(1), rank)
    return A.unflatten(1, delta.shape[1:]), B, lost / whole if whole else 0.0


def _nearest(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """A (rank, in) and B (out, rank) nearest to `delta`, and the norms of what is lost and of the whole."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root, float(S[rank:].norm()), float(S.norm())


def _check_delta(config: Any, layer: Any, adapter_name: str) -> None:
    """Raises NotImplementedError unless `get_delta_weight` is all that the adapter does in a layer."""
    rule = getattr(layer, "lora_variant", {}).get(adapter_name)
    reasons = ["lora_bias"] if getattr(config, "lora_bias", False) else []
    if isinstance(layer, ParamWrapper) and not isinstance(layer, Routed):  # PEFT's own
        reasons.append("target_parameters")
    if rule is not None and not isinstance(rule, Variant):
        reasons.append("use_dora" if getattr(config, "use_dora", False) else type(rule).__name__)
    if reasons:
        raise NotImplementedError(
            f"An adapter with {' and '.join(reasons)} is more than a weight delta that a plain LoRA of a given rank "
            "could approximate. `rank=None` copies it as it is."
        )


def _chosen(model: PeftModel, adapter_name: str | None) -> str:
    if adapter_name is None:
        active = model.active_adapters
        if len(active) != 1:
            raise ValueError(f"{len(active)} adapters are active ({', '.join(active)}): name one by `adapter_name`.")
        return active[0]
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}, only {', '.join(model.peft_config)}.")
    return adapter_name
