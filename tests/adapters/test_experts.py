"""Fused experts: every method that reaches them against a loop over tokens and experts, in float64."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import CASES, Case, tuner_layers
from mixtures import HIDDEN, INNER, MODULES, SIZES, E, K
from processes import join, leave
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import peftx

TOKENS = 9
REACHING = [case for case in CASES if case.info.experts and case.name not in ("bone-bat", "lora-ggpo")]


@pytest.fixture(params=REACHING, ids=lambda case: case.name)
def one(request: pytest.FixtureRequest) -> Case:
    """A mode of a method that reaches experts."""
    return request.param


class Block(nn.Module):
    """An experts module, with what a router would give it."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = SimpleNamespace(**SIZES, _experts_implementation="eager" if dtype == torch.float64 else "grouped_mm")
        self.experts = MODULES[kind](config).to(dtype)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.x = torch.randn(tokens, HIDDEN, dtype=dtype, requires_grad=True)
        scores = torch.randn(tokens, E - 1)  # the last expert gets no token
        self.weights, self.index = scores.softmax(-1).topk(K)
        self.weights = self.weights.to(dtype).requires_grad_()

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        return self.experts(self.x if x is None else x, self.index, self.weights)

    @property
    def names(self) -> list[str]:
        return [name for name, parameter in self.experts.named_parameters() if parameter.ndim == 3]


def adapt(block: Block, case: Case) -> Any:
    names = [f"experts.{name}" for name in block.names]
    return peft.get_peft_model(block, case.config(target_modules=[], target_parameters=names))


def spread(model: nn.Module, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_leaf:
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise.to(parameter)


def dense(layer: Any, expert: int, weight: torch.Tensor) -> torch.Tensor:
    """The delta (out, in) of one expert of this weight, from the tensors by the method's formula."""
    name = "default"
    if hasattr(layer, "lora_A"):
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        A, B = A.reshape(E, -1, A.shape[1])[expert], B.reshape(len(B), -1, E)[..., expert]
        delta = layer.scaling[name] * B @ A
        if name not in layer.lora_magnitude_vector:
            return delta
        norms = (weight + delta).norm(dim=1, keepdim=True)
        norms = norms if layer.lora_variant[name].config.norm_grad == "full" else norms.detach()
        return layer.lora_magnitude_vector[name].weight[expert][:, None] / norms * (weight + delta) - weight
    adapter = layer.adapters[name]
    i = layer.site.in_features
    match type(adapter).__name__:
        case "Bone":
            D = adapter.block[expert]
            return torch.stack([D[j % len(D)] for j in range(i)], dim=1)
        case "LoLDU":
            c = adapter.sigma[expert] * adapter.z[expert] - adapter.c0[expert]
            return sum(c[k] * torch.outer(adapter.PL[expert, :, k], adapter.U[expert, k]) for k in range(len(c)))
        case "Flora":
            G, A, B, K_ = adapter.G, adapter.A, adapter.B, adapter.K
            return adapter.constant * torch.einsum("abc,ia,ob,c->oi", G, A, B, K_[expert])
        case "TriAdaptLoRA":
            A, B, L, U = (getattr(adapter, name)[expert] for name in ("A", "B", "lower", "upper"))
            r = adapter.rank
            return adapter.constant * B[:, :r] @ (L[:r, :r].tril() + U[:r, :r].triu()) @ A[:r]
        case "KronA":
            return torch.kron(adapter.A[expert], adapter.B[expert])
    raise AssertionError(type(adapter))


def loop(block: Block, layers: dict[str, Any]) -> torch.Tensor:
    """The block's output, token by token and expert by expert, with dense deltas."""
    experts: Any = block.experts
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer

    def project(name: str, e: int, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)[e]
        weight = weight.T if experts.is_transposed else weight
        if name in layers:
            weight = weight + dense(layers[name], e, weight)
        return F.linear(x, weight, getattr(experts, f"{name}_bias")[e] if experts.has_bias else None)

    rows = []
    for t in range(len(block.x)):
        row = torch.zeros(HIDDEN, dtype=block.x.dtype)
        for k in range(K):
            e = int(block.index[t, k])
            gated = getattr(experts, "has_gate", True)
            h = project("gate_up_proj" if gated else "up_proj", e, block.x[t])
            h = experts._apply_gate(h) if gated else experts.act_fn(h)
            y = project("down_proj", e, h)
            y = experts.post_expert_norm(y[None])[0] if hasattr(experts, "post_expert_norm") else y
            row = row + block.weights[t, k] * y
        rows.append(row)
    return torch.stack(rows)


def by_parameter(model: Any) -> dict[str, Any]:
    return {layer.parameter_name: layer for layer in tuner_layers(model).values()}


def gradients(output: torch.Tensor, model: Any, block: Block) -> dict[str, torch.Tensor]:
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"x": block.x, "w": block.weights}
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    found = torch.autograd.grad((output * weights).sum(), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("tokens", [TOKENS, 2], ids=["many", "few"])
def test_outputs_and_gradients_are_those_of_a_loop(one: Case, kind: str, tokens: int) -> None:
    block = Block(kind, tokens=tokens)
    model = adapt(block, one).double()
    spread(model)
    output, wanted = model(), loop(block, by_parameter(model))
    torch.testing.assert_close(output, wanted, rtol=1e-9, atol=1e-9)
    found, exact = gradients(output, model, block), gradients(wanted, model, block)
    for name, gradient in exact.items():
        if (
            one.info.exact_gradient or one.info.name == "gradnormlorp" or name in ("x", "w")
        ):  # a rule rescales the adapter's
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", MODULES)
def test_a_fresh_adapter_is_the_base(one: Case, kind: str) -> None:
    block = Block(kind, torch.float32)
    before = block()
    torch.testing.assert_close(adapt(block, one)(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unmerging(one: Case, kind: str, safe: bool) -> None:
    block = Block(kind)
    before = {name: tensor.clone() for name, tensor in block.experts.state_dict().items()}
    model = adapt(block, one).double()
    spread(model)
    wanted = model()
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(model(), wanted)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged.experts) is MODULES[kind]
    torch.testing.assert_close(merged(), wanted)
    assert not torch.equal(merged.experts.down_proj, before["down_proj"])


def test_a_merge_that_is_not_finite_writes_nothing(one: Case) -> None:
    block = Block("mixtral")
    model = adapt(block, one).double()
    spread(model)
    layer = by_parameter(model)["down_proj"]
    before = {name: tensor.clone() for name, tensor in block.state_dict().items() if "proj" in name}
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad and p is not None).fill_(float("inf"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items() if name in before)
    assert not any(layer.merged for layer in tuner_layers(model).values())


def test_peak_of_a_merge_is_one_expert(one: Case) -> None:
    block = Block("mixtral", torch.float32)
    model = adapt(block, one)
    spread(model)
    with Sizes() as sizes:
        model.merge_adapter()
    assert sizes.largest <= max(INNER * 2 * HIDDEN, *(p.numel() for p in model.parameters() if p.requires_grad))


class Sizes(TorchDispatchMode):
    """The number of values of the largest tensor that is made while it is active."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_stack_is_made_in_a_step(one: Case) -> None:
    """Neither the delta of all experts, nor a gradient of the frozen ones."""
    sizes = dict(SIZES, hidden_size=32, moe_hidden_size=32, intermediate_size=32, num_local_experts=16)
    block = Block("mixtral", torch.float32)
    torch.manual_seed(0)
    block.experts = MODULES["mixtral"](SimpleNamespace(**sizes, _experts_implementation="grouped_mm"))
    for parameter in block.experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = adapt(block, one)
    x = torch.randn(TOKENS, 32)
    with Sizes() as made:
        model(x).sum().backward()
    assert made.largest < 16 * 32 * 32
    base = block.experts
    while hasattr(base, "base_layer"):
        base = base.base_layer
    assert base.down_proj.grad is None


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_autocast_is_near(one: Case, kind: str) -> None:
    block = Block(kind, torch.float32)
    model = adapt(block, one)
    spread(model)
    exact = gradients(model(), model, block)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model(), model, block)
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() <= 0.02 * gradient.norm(), name


# Whole models

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SMALL |= dict(vocab_size=64, max_position_embeddings=64, num_experts_per_tok=2)


def mixture(kind: str) -> Any:
    torch.manual_seed(0)
    match kind:
        case "mixtral":
            config: Any = transformers.MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4)
        case "qwen3_moe":
            config = transformers.Qwen3MoeConfig(**SMALL, moe_intermediate_size=8, num_experts=4, intermediate_size=24)
        case "gpt_oss":
            config = transformers.GptOssConfig(
                **SMALL,
                intermediate_size=8,
                num_local_experts=4,
                rope_parameters=ROPE,
            )
        case "deepseek_v3":
            latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
            config = transformers.DeepseekV3Config(
                **{**SMALL, **latent, "head_dim": None, "num_key_value_heads": 4},
                **dict(intermediate_size=24, moe_intermediate_size=8, n_routed_experts=4, n_group=2, topk_group=1),
                first_k_dense_replace=1,
            )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.3)
    return model


def experts_of(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3]


def over(model: nn.Module) -> dict[str, Any]:
    names = sorted({name.split(".", 3)[-1] for name in experts_of(model)})
    return {"target_modules": [], "target_parameters": names, "task_type": "CAUSAL_LM"}


FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", FAMILIES)
def test_peft_lora_with_the_same_factors_is_the_same(kind: str, ids: torch.Tensor) -> None:
    base = mixture(kind)
    lora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=3, **over(base)))
    spread(lora)
    wanted = lora(input_ids=ids).logits
    ours = peft.get_peft_model(copy.deepcopy(base), peftx.ALLoRAConfig(r=3, **over(base)))
    peft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(lora))
    torch.testing.assert_close(ours(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_fast_experts_of_pefts_own_lora(kind: str, ids: torch.Tensor) -> None:
    model = mixture(kind)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=4, **over(model)))
    spread(model)

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return output.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    wanted, exact = step()
    count = peftx.fast_experts(model)
    assert count == len(experts_of(model)) and peftx.fast_experts(model) == 0
    logits, found = step()
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert peftx.fast_experts(model, enable=False) == count
    torch.testing.assert_close(step()[0], wanted, rtol=0, atol=0)


def test_fast_experts_says_where_there_are_none() -> None:
    model = peft.get_peft_model(mixture("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no LoRA on fused experts"):
        peftx.fast_experts(model)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_files(one: Case, kind: str, ids: torch.Tensor, tmp_path: Any) -> None:
    base = mixture(kind)
    model = peft.get_peft_model(copy.deepcopy(base), one.config(**over(base)))
    spread(model)
    wanted = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=0, atol=0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in sorted(tensors) if "base_layer" in key)
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "adapter_model.safetensors")
    modules = set(base.modules())
    with pytest.raises(ValueError, match=f"(?s){key}: missing"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert set(base.modules()) == modules


def test_several_adapters(one: Case, ids: torch.Tensor) -> None:
    base = mixture("qwen3_moe")
    plain = base(input_ids=ids).logits
    targets = over(base)
    model = peft.get_peft_model(base, one.config(**targets), "one")
    model.add_adapter("two", one.config(**targets))
    model.eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".one." in name or ".two." in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = model(input_ids=ids).logits
    assert not torch.allclose(alone["one"], alone["two"]) and not torch.allclose(alone["one"], plain)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=0, atol=0)
    mixed = model(input_ids=ids, adapter_names=["two", "__base__", "one"]).logits
    torch.testing.assert_close(mixed, torch.stack([alone["two"][0], plain[1], alone["one"][2]]), rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["one", "two"])
    both = model(input_ids=ids).logits
    assert not torch.allclose(both, alone["one"])
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, both, rtol=1e-4, atol=1e-4)
    model.set_adapter("one")
    model.delete_adapter("two")
    torch.testing.assert_close(model(input_ids=ids).logits, alone["one"], rtol=0, atol=0)


def test_half_precision_checkpointing_and_generation(one: Case, ids: torch.Tensor) -> None:
    base = mixture("qwen3_moe")
    model = peft.get_peft_model(copy.deepcopy(base), one.config(**over(base)))
    spread(model)
    generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0), generated)

    def step(model: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    exact = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in step(model).items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-6)
    half = peft.get_peft_model(base.bfloat16(), one.config(**over(base)))
    output = half(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and torch.isfinite(output.logits).all()


def test_ranks_by_name(one: Case, ids: torch.Tensor, tmp_path: Any) -> None:
    if "rank_pattern" not in one.info.config.__dataclass_fields__ or "r" not in one.info.tiny:
        pytest.skip("the method has no ranks")
    base = mixture("mixtral")
    model = peft.get_peft_model(base, one.config(**over(base), rank_pattern={"experts.down_proj": 4}))
    sizes = {
        layer.parameter_name: sum(p.numel() for n, p in layer.named_parameters() if "base_layer" not in n)
        for layer in tuner_layers(model).values()
    }
    same = peft.get_peft_model(mixture("mixtral"), one.config(**over(mixture("mixtral"))))
    before = {
        layer.parameter_name: sum(p.numel() for n, p in layer.named_parameters() if "base_layer" not in n)
        for layer in tuner_layers(same).values()
    }
    assert sizes["gate_up_proj"] == before["gate_up_proj"] and sizes["down_proj"] > before["down_proj"]
    spread(model)
    model.save_pretrained(tmp_path)
    for small in (False, True):
        loaded = peft.PeftModel.from_pretrained(mixture("mixtral"), tmp_path, low_cpu_mem_usage=small)
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)


def test_exports_are_stock_lora(one: Case, ids: torch.Tensor, tmp_path: Any) -> None:
    base = mixture("qwen3_moe")
    model = peft.get_peft_model(copy.deepcopy(base), one.config(**over(base)))
    spread(model)
    wanted = model(input_ids=ids).logits
    if one.lora_export != "exact":
        with pytest.raises(NotImplementedError, match=r"no exact (LoRA form|export)"):
            peftx.export_lora(model, tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
        errors = peftx.export_lora(model, tmp_path / "lora", rank=16)  # the whole of each delta
    else:
        errors = peftx.export_lora(model, tmp_path / "lora")
    assert max(errors.values()) < 1e-6
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    assert type(stock.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(stock(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_ranks_that_torchs_grouped_product_takes_as_they_lie_or_not(kind: str, rank: int) -> None:
    block = Block(kind, torch.float32)
    names = [f"experts.{name}" for name in block.names]
    for config in (peftx.ALLoRAConfig, peftx.BoneConfig, peftx.FloraConfig, peftx.LoLDUConfig):
        model = peft.get_peft_model(copy.deepcopy(block), config(r=rank, target_modules=[], target_parameters=names))
        spread(model)
        torch.testing.assert_close(model(), loop(model.base_model.model, by_parameter(model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", ["one", "two"])
def test_one_parameter_alone_or_both(names: str) -> None:
    block = Block("mixtral")
    targets = block.names if names == "two" else block.names[-1:]
    config = peftx.BoneConfig(r=3, target_modules=[], target_parameters=[f"experts.{name}" for name in targets])
    model = peft.get_peft_model(block, config).double()
    spread(model)
    torch.testing.assert_close(model(), loop(block, by_parameter(model)))


def test_triadaptlora_grows_all_experts_together() -> None:
    block = Block("mixtral", torch.float32)
    config = peftx.TriAdaptLoRAConfig(
        init_r=1,
        target_r=3,
        growth_size=1,
        growth_interval=2,
        init_warmup=1,
        total_step=10,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in block.names],
    )
    model = peft.get_peft_model(block, config)
    tuner, names = model.base_model, {"gate_up_proj", "down_proj"}
    assert set(tuner.ranks().values()) == {1} and {name.rpartition(".")[2] for name in tuner.ranks()} == names
    before, count = model(), tuner.get_nb_active_parameters()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    grown = []
    for step in range(1, 11):
        model().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        output = model()
        grown += tuner.update_and_grow(step)
        torch.testing.assert_close(model(), output)  # a rank starts as nothing
    assert grown and max(tuner.ranks().values()) > 1 and tuner.get_nb_active_parameters() > count
    assert not torch.allclose(before, model())
    output = model()
    tuner.finalize()
    torch.testing.assert_close(model(), output)
    layer = by_parameter(model)["down_proj"]
    assert layer.adapters["default"].A.shape == (E, layer.adapters["default"].rank, INNER)


def test_fedsvd_turns_the_basis_of_every_expert() -> None:
    block = Block("mixtral")
    names = [f"experts.{name}" for name in block.names]
    model = peft.get_peft_model(block, peftx.FedSVDConfig(r=2, target_modules=[], target_parameters=names)).double()
    spread(model)
    layer = by_parameter(model)["down_proj"]
    assert not layer.lora_A["default"].weight.requires_grad
    output = model()
    found = model.base_model.update_basis(1)
    torch.testing.assert_close(model(), output)
    A, B = layer.factors("default")
    torch.testing.assert_close(A @ A.mT, torch.eye(2, dtype=A.dtype).expand(E, 2, 2))
    for expert in range(E):
        wanted = torch.linalg.svdvals(B[expert] @ A[expert])[:2]
        torch.testing.assert_close(found["experts"][expert], wanted)


def test_mgpo_steps_against_the_momentum_of_the_stack() -> None:
    """The output is that of A and B moved by -rho f d / |d|, d = s (M_B A + B M_A) of all experts; the gradients of A
    and B are those of plain LoRA there."""
    block = Block("mixtral")
    config = peftx.LoRAGGPOConfig(
        r=2,
        lora_alpha=2,
        mode="mgpo",
        mgpo_rho=0.3,
        target_modules=[],
        auto_update=False,
        target_parameters=["experts.down_proj"],
    )
    model = peft.get_peft_model(block, config).double().train()
    spread(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.attach_optimizer(optimizer)
    model().square().sum().backward()
    model.base_model.update_ggpo_stats()
    optimizer.step()
    optimizer.zero_grad()
    layer = by_parameter(model)["down_proj"]
    rule = layer.lora_variant["default"]
    A, B = layer.factors("default")
    M = [optimizer.state[layer.lora_A["default"].weight]["exp_avg"]]
    M += [optimizer.state[layer.lora_B["default"].weight]["exp_avg"]]
    M_A, M_B = layer.stacked(*M)
    d = torch.stack([M_B[e] @ A[e] + B[e] @ M_A[e] for e in range(E)])
    f = min(1 / float(rule.mean_norm), config.mgpo_max_scale)
    eps = -0.3 * f * d / d.norm()
    base = layer.base_layer
    plain = model.eval()()
    model.train()
    output = model()
    with torch.no_grad():
        base.down_proj += eps
    wanted = model.eval()()
    with torch.no_grad():
        base.down_proj -= eps
    torch.testing.assert_close(output, wanted)
    assert not torch.allclose(output, plain)


def test_all_linear_says_what_it_leaves_out(one: Case) -> None:
    base = mixture("qwen3_moe")
    with pytest.warns(UserWarning, match=r"leaves out the experts.*target_parameters=\['mlp.experts.gate_up_proj'"):
        peft.get_peft_model(base, one.config(target_modules="all-linear"))


@pytest.mark.slow
def test_compiles_without_a_break(one: Case, ids: torch.Tensor) -> None:
    if one.info.name == "krona":
        pytest.skip("its formula takes no stack: expert by expert, as many as have tokens")
    model = mixture("qwen3_moe")
    model.config.use_cache = False
    model = peft.get_peft_model(model, one.config(**over(model))).train()
    spread(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    wanted, found = (network(input_ids=ids, labels=ids) for network in (model, compiled))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    found.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_compiles_sizes_that_torchs_grouped_product_does_not_take(dtype: torch.dtype) -> None:
    config = peftx.BoneConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    model = peft.get_peft_model(Block("mixtral", dtype), config)
    spread(model)
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager", fullgraph=True)()
    torch.testing.assert_close(found, model())
    found.sum().backward()


@pytest.mark.slow
def test_a_trainer_beside_donod_and_fisher(one: Case, tmp_path: Any) -> None:
    model = mixture("qwen3_moe")
    model = peft.get_peft_model(model, one.config(**over(model)))
    rows = torch.randint(1, 64, (12, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_steps=3,
    )
    callbacks = [peftx.DonodCallback(keep=0.5, report=False), peftx.FisherCallback()]
    if one.info.callback:
        callbacks.append(one.info.callback())
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    assert len(peftx.pruning.Selection.load(tmp_path / "selection.json").indices) == 6
    again = mixture("qwen3_moe")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "checkpoint-3")
    torch.testing.assert_close(again(input_ids=rows[:2]).logits, model.eval()(input_ids=rows[:2]).logits)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_inspection_and_cards(one: Case, tmp_path: Any) -> None:
    base = mixture("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, one.config(**over(base)))
    spread(model)
    model.save_pretrained(tmp_path / "adapter")
    found = peftx.hub.inspect_adapter(str(tmp_path / "adapter"))
    assert not found.problems and len(found.modules) == 4
    if "r" in one.info.tiny:
        assert {module.rank for module in found.modules} == {one.info.tiny["r"]}
    assert "target_parameters" in (tmp_path / "adapter" / "README.md").read_text()


# Bad input


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 16)
        self.stack = nn.Parameter(torch.zeros(3, 4, 4))


def refused(case: Case, model: nn.Module, names: list[str], error: type[Exception], match: str) -> None:
    modules = list(model.modules())
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        holder = nn.Module()
        holder.inner = model
        peft.get_peft_model(holder, case.config(target_modules=[], target_parameters=names))
    assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == trained


def test_what_is_no_stack_of_experts(one: Case) -> None:
    refused(one, Odd(), ["stack"], TypeError, "stack of a Odd is no parameter of fused experts")
    refused(one, Odd(), ["lin0.weight"], TypeError, "weight of a Linear is no parameter of fused experts")
    refused(one, Odd(), ["nothing"], ValueError, "nothing|target_parameters|not found|No modules")
    lost = r"\['experts.nothing'\] match no parameter of the model, whose fused experts are \[.*experts.down_proj'"
    refused(one, Block("mixtral"), ["experts.down_proj", "experts.nothing"], ValueError, lost)
    refused(one, Block("gpt_oss"), ["experts.down_proj_bias"], TypeError, "down_proj_bias.*2 axes")
    split = Block("mixtral")
    split.experts._is_expert_parallel = True
    refused(one, split, ["experts.down_proj"], TypeError, "expert parallelism")
    packed = Block("mixtral")
    packed.experts.down_proj = nn.Parameter(torch.zeros(E, 2, 2, dtype=torch.uint8), requires_grad=False)
    refused(one, packed, ["experts.down_proj"], TypeError, "packed as torch.uint8")


def test_methods_without_experts_say_so(case: Case) -> None:
    if case in REACHING:
        return
    base = mixture("mixtral")
    with pytest.raises((NotImplementedError, ValueError), match=r"target_parameters|init_weights='bat'"):
        peft.get_peft_model(base, case.config(**over(base)))


@pytest.mark.parametrize("r", [2, 3, 4])
def test_mgpo_steps_against_its_moments(r: int, ids: torch.Tensor) -> None:
    model = mixture("qwen3_moe")
    model = peft.get_peft_model(model, peftx.LoRAGGPOConfig(r=r, mode="mgpo", auto_update=False, **over(model)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.attach_optimizer(optimizer)
    for step in range(3):
        assert not step or model(input_ids=ids).logits.isfinite().all()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_ggpo_stats()
        optimizer.step()
        optimizer.zero_grad()
    perturbed = model(input_ids=ids).logits  # in learning passes only
    assert not torch.allclose(perturbed, model.eval()(input_ids=ids).logits, rtol=1e-6)


# Behind fused experts

FULL = {"phm_dim": 2, "reduction_factor": 2, "init_weights": False}


@pytest.mark.parametrize("kind", MODULES)
def test_compacter_sits_behind_the_experts(kind: str) -> None:
    block = Block(kind)
    config = peftx.CompacterConfig(**FULL, target_modules=["experts"])
    model = peft.get_peft_model(block, config).double()
    output = model()
    with model.disable_adapter():
        h = model()
    adapter = block.experts.adapters["default"]
    A, own = model.base_model.compacter_rule["default"].weight, dict(adapter.named_parameters())
    down, up = (sum(torch.kron(A[i], own[f"{w}_s"][i] @ own[f"{w}_t"][i]) for i in range(2)) for w in ("down", "up"))
    inner = F.gelu(h @ down + own["down_bias"], approximate="tanh")
    torch.testing.assert_close(output, h + inner @ up + own["up_bias"])
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    assert type(model.unload().experts) is MODULES[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_compacters_own_targets_in_a_mixture(kind: str, ids: torch.Tensor, tmp_path: Any) -> None:
    base = mixture(kind)
    model = peft.get_peft_model(copy.deepcopy(base), peftx.CompacterConfig(**FULL, task_type="CAUSAL_LM")).eval()
    assert sum(name.endswith("mlp.experts") for name in model.targeted_module_names) == (2 - (kind == "deepseek_v3"))
    model.add_adapter("other", peftx.CompacterConfig(**FULL, task_type="CAUSAL_LM"))
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = model(input_ids=ids).logits
    names = ["default", "__base__", "other"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = base(input_ids=ids).logits if name == "__base__" else wanted[name]
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "other")
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted["other"])


def test_transformers_own_loading(one: Case, ids: torch.Tensor, tmp_path: Any) -> None:
    base = mixture("qwen3_moe")
    model = peft.get_peft_model(copy.deepcopy(base), one.config(**over(base))).eval()
    spread(model)
    model.save_pretrained(tmp_path)
    base.load_adapter(tmp_path)
    torch.testing.assert_close(base(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_other_implementations_of_the_base(one: Case, implementation: str, ids: torch.Tensor) -> None:
    base = mixture("qwen3_moe")
    model = peft.get_peft_model(copy.deepcopy(base), one.config(**over(base))).eval()
    spread(model)
    wanted = model(input_ids=ids).logits
    model.base_model.model.set_experts_implementation(implementation)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)


# Two processes


def train_alone(rank: int, folder: Path) -> None:
    join(rank, folder)
    rows = torch.randint(0, 64, (4, 7), generator=torch.Generator().manual_seed(0))
    for case in REACHING:
        model = peft.get_peft_model(mixture("qwen3_moe"), case.config(**over(mixture("qwen3_moe"))))
        spread(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        part = rows[2 * rank : 2 * rank + 2]
        parallel(input_ids=part, labels=part).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if rank == 0:
            model.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            for name, p in model.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=f"{case.name}: {name}")
    Path(folder, f"done{rank}").touch()
    leave()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_alone, args=(tmp_path,), nprocs=2)
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}
