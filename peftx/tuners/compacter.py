"""Compacter and Compacter++, arXiv:2106.04647: bottleneck adapters of parameterised hypercomplex multiplications."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.nn import functional as F

from ..adapters import Adapter, AdapterConfig, AdapterModel, LinearSite, MixtureSite, Number, Site, register
from ..adapters.products import accumulate, at_least_fp32, by_hand, kept, uncast
from ..adapters.sites.experts import is_experts
from .hypercomplex import Down, Up, down_factors, up_factor

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}

# The modules that end a sub-layer: model types, Compacter's targets (after self-attention and after the feed-forward
# block), Compacter++'s (feed-forward only). PEFT matches names by their ends, so `output.dense` would be both in BERT.
TARGETS: list[tuple[str, list[str] | str, list[str] | str]] = [
    ("t5 mt5 umt5", ["SelfAttention.o", "DenseReluDense.wo"], ["DenseReluDense.wo"]),
    (
        "bert roberta xlm-roberta electra deberta deberta-v2",
        r".*\blayer\.\d+\.(attention\.)?output\.dense",
        r".*\blayer\.\d+\.output\.dense",
    ),
    (
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3",
        ["self_attn.o_proj", "mlp.down_proj"],
        ["mlp.down_proj"],
    ),
    (  # fused experts, and the dense layers between
        "mixtral qwen2_moe qwen3_moe gpt_oss deepseek_v2 deepseek_v3",
        ["self_attn.o_proj", "mlp.experts", "mlp.down_proj"],
        ["mlp.experts", "mlp.down_proj"],
    ),
    ("gpt2", ["attn.c_proj", "mlp.c_proj"], ["mlp.c_proj"]),
    ("gptj", ["attn.out_proj", "mlp.fc_out"], ["mlp.fc_out"]),
    ("gpt_neox", ["attention.dense", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    ("opt bart mbart", ["self_attn.out_proj", "fc2"], ["fc2"]),
    ("distilbert", ["attention.out_lin", "ffn.lin2"], ["ffn.lin2"]),
    (  # either layout of transformers 5
        "vit deit",
        r".*\blayers?\.\d+\.(attention\.o_proj|mlp\.fc2|(attention\.)?output\.dense)",
        r".*\blayers?\.\d+\.(mlp\.fc2|output\.dense)",
    ),
]
COMPACTER = {model_type: both for types, both, _ in TARGETS for model_type in types.split()}
COMPACTER_PLUS_PLUS = {model_type: ffn for types, _, ffn in TARGETS for model_type in types.split()}


@dataclass
class CompacterConfig(AdapterConfig):
    """Bottleneck adapters behind the targeted modules, made of Kronecker products with one rule that all share.

    For the output h (d values) of a targeted module, with n = phm_dim and b = d // reduction_factor, down to a multiple
    of n and at least n:

        h' = h + up(phi(down(h))),    down and up: x -> x H + bias,    H = sum_i kron(A_i, s_i t_i)

    The rule A, n matrices of n x n, is one tensor for the whole model, in the file and in the optimizer; s_i and t_i
    have rank phm_rank and belong to the module: 2 phm_rank (d + b) + d + b values a module, n^3 for the rule. At the
    start h' equals h to about 1e-6. A nonlinearity on the module's output is no change of its weight: such an adapter
    cannot be merged or exported to LoRA, only unloaded.

    The rule's gradient is the sum over all modules and far larger than theirs: train with Adam, not with SGD. Under
    DDP, gradient checkpointing must not be reentrant (`{"use_reentrant": False}`), since the rule is used in many
    checkpointed blocks. With FSDP keep the rule, which is outside of the blocks, in the root unit.

    The backward is written by hand: it has no second derivative.

    Args:
        phm_dim: n; it divides d of every target. Default 4.
        reduction_factor: d over b; default 32.
        phm_rank: rank of s_i t_i; default 1.
        ffn_only: `True` is Compacter++, adapters behind feed-forward blocks only; `False` (default) is Compacter,
            behind self-attention too. It chooses the default of `target_modules`; never cross-attention.
        shared_phm_rule: whether the rule is shared; else both projections of every module have their own. Default
            `True`.
        factorized_phm: whether s_i t_i is a product; else a full d/n x b/n matrix. Default `True`.
        learn_phm: whether the rule is trained; default `True`.
        phm_init_range: standard deviation of the shared rule at the start; default 1e-4. (One that is not shared
            starts with 0.01, as in the authors' code, and further from the base model.)
        phm_bias: whether down and up have biases; default `True`, as published. `peftx train` sets `False`: at the
            rate at which the rule learns, Adam's early steps carry noise into all of up's biases alike. With them one
            of five short trainings on SST-2 did not learn, without them all did (MiniLM, `reduction_factor=8,
            phm_rank=4`, 100 steps at 1e-2).
        non_linearity: phi; default `"gelu_new"` (the tanh approximation).
        dropout: on the output of `up`; default 0.
        train_layer_norms: whether the normalisation layers of the base model are trained and saved too, as in the
            paper, whose 0.047 % of T5-base counts them. Default `False`.
        init_weights: `True` as published; `"identity"` starts exactly as the base model (t of `up` is zero); `False`
            with a random delta (tests).

    The other arguments and the errors raised are those of `peftx.AdapterConfig`.
    """

    phm_dim: int = field(default=4, metadata={"help": "n: the rule is n x n x n; divides both widths of a projection."})
    reduction_factor: int = field(default=32, metadata={"help": "Width of the module's output over the bottleneck's."})
    phm_rank: int = field(default=1, metadata={"help": "Rank of the factors that each module owns."})
    ffn_only: bool = field(default=False, metadata={"help": "Compacter++: default targets after feed-forward only."})
    shared_phm_rule: bool = field(default=True, metadata={"help": "One rule for the model, or two for each module."})
    factorized_phm: bool = field(default=True, metadata={"help": "Low-rank factors, or full matrices."})
    learn_phm: bool = field(default=True, metadata={"help": "Whether the rule is trained."})
    phm_init_range: Number = field(
        default=1e-4, metadata={"help": "Standard deviation of the shared rule at the start."}
    )
    phm_bias: bool = field(default=True, metadata={"help": "Whether the two projections have biases."})
    non_linearity: str = field(default="gelu_new", metadata={"help": f"One of {', '.join(ACTIVATIONS)}."})
    dropout: Number = field(default=0.0, metadata={"help": "Dropout on the adapter's output."})
    train_layer_norms: bool = field(default=False, metadata={"help": "Train the base model's norms too (the paper)."})
    init_weights: bool | Literal["identity"] = field(  # type: ignore[assignment]
        default=True,
        metadata={"help": "True: as published. 'identity': exactly the base model. False: random delta (tests)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("phm_dim", "reduction_factor", "phm_rank"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be a positive integer, got {getattr(self, name)}.")
        if self.phm_init_range < 0:
            raise ValueError(f"`phm_init_range` must not be negative, got {self.phm_init_range}.")
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(f"`non_linearity` must be one of {', '.join(ACTIVATIONS)}; got {self.non_linearity!r}.")


class Rule(nn.Module):
    """The rule (n, n, n) that all modules of an adapter share."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> torch.Tensor:  # called, so that hooks see who uses the weight
        return self.weight


class SharedRuleModel(AdapterModel):
    """The tuner; it holds the shared rules, `compacter_rule`, to which the adapters only refer."""

    uses_shared_state = True
    target_module_mapping = COMPACTER
    compacter_rule: Any  # a ModuleDict of `Rule` by adapter name
    peft_config: dict[str, Any]

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.compacter_rule = nn.ModuleDict()

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            model_type = model_config["model_type"]
            targets = (COMPACTER_PLUS_PLUS if peft_config.ffn_only else COMPACTER).get(model_type)
            if targets is None:
                raise ValueError(
                    "Please specify `target_modules` in `peft_config`: Compacter has no default for the model type "
                    f"{model_type!r}. Name the modules that end the feed-forward and self-attention blocks."
                )
            if isinstance(targets, str) and peft_config.layers_to_transform is not None:  # goes with ends of names only
                names = [name for name, _ in self.model.named_modules() if re.fullmatch(targets, name)]
                targets = [name.partition(".")[2] for name in names]
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
        if peft_config.train_layer_norms:
            norms = {name.rpartition(".")[2] for name, m in self.model.named_modules() if _is_norm(m)}
            peft_config.modules_to_save = sorted(norms.union(peft_config.modules_to_save or ()))
        return peft_config

    def _find_experts(self, model: nn.Module, config: Any) -> None:
        modules = [name for name, module in model.named_modules() if is_experts(module)]
        if config.target_modules and not any(check_target_module_exists(config, name) for name in modules):
            super()._find_experts(model, config)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)
        adapter = getattr(parent, target_name).adapters[adapter_name]
        if not peft_config.shared_phm_rule:
            return
        if adapter_name not in self.compacter_rule:
            n, std = peft_config.phm_dim, peft_config.phm_init_range if peft_config.init_weights else 1.0
            device = "meta" if adapter.up_t.is_meta else None  # as of an adapter whose file does not fit
            rule = torch.randn(n, n, n, device=device) * std
            self.compacter_rule[adapter_name] = Rule(rule.to(adapter.site.dtype))
            self._move_adapter_to_device_of_base_layer(adapter_name)
        adapter.share(self.compacter_rule[adapter_name])

    @classmethod
    def current_key(cls, key: str) -> str:
        return f"{key}.weight" if key.endswith(".compacter_rule") else super().current_key(key)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this on all modules that have it when it has loaded a file, layers and tuner.
        layer = next((layer for _, layer in self._layers() if adapter_name in layer.adapters), None)
        if layer is not None and adapter_name in self.compacter_rule:
            rule, device = self.compacter_rule[adapter_name], device or layer.site.device
            if not rule.weight.is_meta and device is not None:
                rule.to(device)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype and adapter_name in self.compacter_rule:
            rule = self.compacter_rule[adapter_name]
            rule.to(torch.promote_types(rule.weight.dtype, torch.float32))

    # PEFT trains, freezes and deletes what is in the layers; the rule of an adapter follows.

    def _follow_layers(self) -> None:
        for name in list(self.compacter_rule):
            if name not in self.peft_config:
                del self.compacter_rule[name]
                continue
            adapters = [layer.adapters[name] for _, layer in self._layers() if name in layer.adapters]
            trained = any(parameter.requires_grad for adapter in adapters for parameter in adapter.parameters())
            self.compacter_rule[name].weight.requires_grad_(trained and self.peft_config[name].learn_phm)

    def withdraw(self, adapter_name: str) -> None:
        super().withdraw(adapter_name)
        self._follow_layers()

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().inject_adapter(*args, **kwargs)
        finally:
            self._follow_layers()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self._follow_layers()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._follow_layers()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._follow_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._follow_layers()


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.lower().endswith(("layernorm", "rmsnorm"))


@register(
    "compacter",
    config=CompacterConfig,
    paper="arXiv:2106.04647",
    tuner=SharedRuleModel,
    lora_export="none",
    layer_types=("Linear", "Conv1D", "fused experts"),
    exact_start=False,
    tiny={"phm_dim": 2, "reduction_factor": 1},
    learning_rate=1e-2,
    train_settings={"phm_bias": False},
)
class Compacter(Adapter):
    sites = (LinearSite, MixtureSite)
    no_delta = "its nonlinear bottleneck reads the module's output, so no change of the weight equals it"

    down_rule: nn.Parameter
    up_rule: nn.Parameter
    shared: Rule

    def __init__(self, site: Site, config: CompacterConfig) -> None:
        super().__init__(site, config)
        d, n, k = site.out_features, config.phm_dim, config.phm_rank
        if d % n:
            fitting = ", ".join(str(m) for m in range(1, min(d, 16) + 1) if d % m == 0)
            raise ValueError(f"phm_dim={n} does not divide d={d}, the width of the module's output; {fitting} do.")
        b = self.bottleneck
        factors = {"down_s": (n, d // n, k), "down_t": (n, k, b // n), "up_s": (n, b // n, k), "up_t": (n, k, d // n)}
        if not config.factorized_phm:
            factors = {"down_s": (n, d // n, b // n), "up_t": (n, b // n, d // n)}
        tensors = {name: glorot(shape) for name, shape in factors.items()}
        if config.init_weights == "identity":
            tensors["up_t"].zero_()
        if config.phm_bias:
            tensors |= {"down_bias": torch.zeros(b), "up_bias": torch.zeros(d)}
        if not config.shared_phm_rule:
            std = 0.01 if config.init_weights else 1.0
            tensors |= {name: torch.randn(n, n, n) * std for name in ("down_rule", "up_rule")}
            if not config.learn_phm:
                self.freeze("down_rule", "up_rule")
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    @property
    def bottleneck(self) -> int:
        """b, the width between the two projections."""
        n = self.config.phm_dim
        return max(self.site.out_features // self.config.reduction_factor // n, 1) * n

    def share(self, rule: Rule) -> None:
        """Takes the rule of all modules for both projections."""
        object.__setattr__(self, "shared", rule)  # not registered: one tensor in the file

    def rules(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The rules (n, n, n) of both projections, the module's own or the shared one, at least in fp32."""
        if "down_rule" in self._parameters:
            return at_least_fp32(self.down_rule).to(device), at_least_fp32(self.up_rule).to(device)
        rule = at_least_fp32(self.shared()).to(device)
        return rule, rule

    def factors(self, device: torch.device) -> tuple[list[Any], list[Any]]:
        """The rule, s, t and the bias, or None, of down and of up, in the dtype of the rules."""
        config, (down, up) = self.config, self.rules(device)
        k = self.bottleneck // config.phm_dim
        own: dict[str, Any] = {name: parameter.to(down.dtype) for name, parameter in self.named_parameters()}
        if not config.factorized_phm:
            own["down_t"] = own["up_s"] = torch.eye(k, dtype=down.dtype, device=down.device).expand(len(down), k, k)
        ends = ("s", "t", "bias")
        return [down, *(own.get(f"down_{end}") for end in ends)], [up, *(own.get(f"up_{end}") for end in ends)]

    def projections(self, device: torch.device) -> tuple[Any, ...]:
        """`wide`, `narrow` and the bias of down, or None; `narrow`, `wide` and the bias of up."""
        (rule, s, t, bias), (up_rule, up_s, up_t, up_bias) = self.factors(device)
        return *down_factors(rule, s, t), bias, up_factor(up_rule, up_s), up_t.flatten(0, 1), up_bias

    def add_delta(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        config, n, phi = self.config, self.config.phm_dim, ACTIVATIONS[self.config.non_linearity]
        drop = config.dropout if self.training else 0.0
        with uncast(result):  # the rule's products are too small for fp16
            if by_hand():
                down, up = self.factors(result.device)
                result, h = Down.apply(result, *down)
                y = Up.apply(torch.zeros_like(result) if drop else result, phi(h), *up, self.scale)
            else:
                projections = kept(self, result.device, lambda: self.projections(result.device))
                wide, narrow, bias, up, out, up_bias = projections
                z = F.linear(result.unflatten(-1, (n, -1)), wide.to(result.dtype)).flatten(-2)
                z = (phi(F.linear(z.to(narrow.dtype), narrow, bias)) @ up).unflatten(-1, (n, -1))
                y = torch.zeros_like(result) if drop else result
                if up_bias is not None:
                    y = torch.add(y, up_bias.to(y.dtype), alpha=self.scale)
                y = accumulate(y.unflatten(-1, (n, -1)), z, out, self.scale).flatten(-2)
            return result + F.dropout(y, drop) if drop else y


def glorot(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor (n, p, q) of n matrices with Xavier's uniform start and gain sqrt(2) each."""
    tensor = torch.empty(shape)
    for matrix in tensor:
        nn.init.xavier_uniform_(matrix, gain=2**0.5)
    return tensor
