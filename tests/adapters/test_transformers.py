"""What users do with an adapter on a transformers model: every method, on Llama, BERT, GPT-2 (Conv1D) and T5."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CASES, EXAMPLES, Case, adapted, forward, logits, randomize, tiny_model, tuner_layers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

KINDS = ["llama", "bert", "gpt2", "t5"]
DIFFERENT = 1e-4  # an adapter that does something changes the output by more than this, relatively
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[case for case in CASES if not case.info.model.uses_shared_state], ids=lambda case: case.name)
def native(request: pytest.FixtureRequest) -> Case:
    """Like `case`, for the methods whose state is all in the layers: others PEFT cannot put into a bare model."""
    return request.param


@pytest.fixture(params=[case for case in CASES if case.info.model.uses_shared_state], ids=lambda case: case.name)
def shared(request: pytest.FixtureRequest) -> Case:
    return request.param


def larger(case: Case) -> dict[str, int]:
    """Arguments that double the sizes of the tiny config."""
    return {name: 2 * value for name, value in case.info.tiny.items()}


def trained_shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}


def near(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors differ by at most `tolerance`, relative to the norm of `wanted`."""
    return bool((actual.double() - wanted.double()).norm() <= tolerance * wanted.double().norm())


def starts_as(case: Case, actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(actual, wanted) if case.info.exact_start else near(actual, wanted)


def gradients(model: nn.Module, tokens: torch.Tensor, loss_scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradients of the trainable parameters for a fixed loss and, in training mode, fixed dropout masks."""
    model.zero_grad()
    torch.manual_seed(0)
    (loss_scale * forward(model, tokens).float().sin().mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def shift_saved_tensors(model: nn.Module, adapter_name: str = "default") -> None:
    """Changes every floating-point tensor that is saved, the frozen ones too: one that is not loaded will show."""
    generator = torch.Generator().manual_seed(3)
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if tensor.is_floating_point() and not key.endswith((".pivots", ".sketch")):  # by which LoLDU knows its base
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)


# Which modules


def test_default_targets(case: Case, kind: str, tokens: torch.Tensor) -> None:
    wanted = logits(tiny_model(kind), tokens)
    model = get_peft_model(tiny_model(kind), case.config())
    targets = case.info.model.target_module_mapping[model.config.model_type]
    lora = get_peft_model(tiny_model(kind), LoraConfig(target_modules=targets))
    assert set(tuner_layers(model)) == set(lora.targeted_module_names)
    assert starts_as(case, logits(model.eval(), tokens), wanted)
    randomize(model, case)
    assert not near(logits(model, tokens), wanted, DIFFERENT)


def test_all_linear(case: Case, kind: str, tokens: torch.Tensor) -> None:
    options = {"target_modules": "all-linear", "task_type": TASKS[kind]}
    model = get_peft_model(tiny_model(kind), case.config(**options))
    lora = get_peft_model(tiny_model(kind), LoraConfig(**options))
    assert set(tuner_layers(model)) == set(lora.targeted_module_names)
    assert len(tuner_layers(model)) == {"llama": 14, "bert": 13, "gpt2": 8, "t5": 32}[kind]
    assert starts_as(case, logits(model.eval(), tokens), logits(tiny_model(kind), tokens))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, "1.q 1.v"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, "0.q"),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0.*q_proj"}, "0.k 1.k 1.q"),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, "0.q 1.q"),
        ({"target_modules": r".*\.1\..*(gate|up)_proj"}, "1.gate 1.up"),
    ],
    ids=["layers_to_transform", "layers_pattern", "exclude_regex", "exclude_names", "regex"],
)
def test_chosen_modules(case: Case, options: dict, wanted: str) -> None:
    names = tuner_layers(get_peft_model(tiny_model("llama"), case.config(**options)))  # model.layers.0.self_attn.q_proj
    paths = [name.removesuffix("_proj").split(".") for name in names]
    assert sorted(f"{path[2]}.{path[-1]}" for path in paths) == wanted.split()


@pytest.mark.parametrize("bias", ["none", "all", "only"])
def test_biases_and_modules_to_save_are_trained_and_restored(
    case: Case, tokens: torch.Tensor, tmp_path: Path, bias: str
) -> None:
    base = tiny_model("bert")
    config = case.config(task_type=TaskType.SEQ_CLS, bias=f"{case.info.prefix}only" if bias == "only" else bias)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    biases = {name for name in trained if name.endswith(".bias") and "classifier" not in name}
    every_bias = [name for name, _ in base.named_parameters() if name.endswith(".bias") and "classifier" not in name]
    in_layers = len(tuner_layers(model))
    assert len(biases) == {"none": 0, "all": len(every_bias), "only": in_layers}[bias]
    assert sum("base_layer" in name for name in biases) == (0 if bias == "none" else in_layers)
    assert any("classifier.modules_to_save" in name for name in trained)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert not near(logits(base, tokens), logits(model, tokens), DIFFERENT)


PATTERNS = [case for case in CASES if hasattr(case.config(), "rank_pattern")]


@pytest.mark.parametrize("pattern_case", PATTERNS, ids=[case.name for case in PATTERNS])
def test_rank_pattern(pattern_case: Case, tokens: torch.Tensor, tmp_path: Path) -> None:
    case, names = pattern_case, ["q_proj", "v_proj"]
    has_r = hasattr(case.config(), "r")
    small, large = (
        trained_shapes(adapted(tiny_model("llama"), case, target_modules=names, **options))
        for options in [{"r": r} if has_r else {"rank_pattern": {".*": r}} for r in (2, 4)]
    )
    pattern = {"layers.0.self_attn.q_proj": 4, r".*\.1\..*v_proj": 4}
    rest = {} if has_r else {"layers.1.self_attn.q_proj": 2, r".*\.0\..*v_proj": 2}
    options = {"rank_pattern": {**pattern, **rest}, **({"r": 2} if has_r else {})}
    model = adapted(tiny_model("llama"), case, target_modules=names, **options)
    for name, shape in trained_shapes(model).items():
        assert shape == (large if "layers.0.self_attn.q_proj" in name or "1.self_attn.v_proj" in name else small)[name]
    assert small != large

    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path), tokens), logits(model, tokens))


ALPHAS = [case for case in CASES if hasattr(case.config(), "alpha_pattern")]


@pytest.mark.parametrize("pattern_case", ALPHAS, ids=[case.name for case in ALPHAS])
def test_alpha_pattern(pattern_case: Case) -> None:
    case, names = pattern_case, ["q_proj", "v_proj"]
    alpha = "lora_alpha" if hasattr(case.config(), "lora_alpha") else "alpha"
    if case.is_lora and case.info.config.lora_alpha is None:  # the method has no scaling: alpha equals r
        with pytest.raises(ValueError, match="alpha_pattern"):
            case.config(alpha_pattern={"v_proj": 6})
        return

    def deltas(**options) -> dict[str, torch.Tensor]:
        model = adapted(tiny_model("llama"), case, target_modules=names, **options)
        return {name: layer.get_delta_weight("default") for name, layer in tuner_layers(model).items()}

    plain, high, mixed = (
        deltas(**{alpha: 2}),
        deltas(**{alpha: 6}),
        deltas(**{alpha: 2, "alpha_pattern": {"v_proj": 6}}),
    )
    for name, delta in mixed.items():
        wanted, other = (high, plain) if name.endswith("v_proj") else (plain, high)
        assert torch.equal(delta, wanted[name]) and not torch.equal(delta, other[name])


def test_mamba_projections_that_the_kernel_reads_are_refused(case: Case) -> None:
    config = transformers.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=64)
    model = transformers.MambaForCausalLM(config)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"{case.info.peft_type.value}.*out_proj"):
        get_peft_model(model, case.config(target_modules=["in_proj", "out_proj"]))
    assert [name for name, _ in model.named_modules()] == names
    assert len(tuner_layers(get_peft_model(model, case.config(target_modules=["in_proj"])))) == 1


def test_print_trainable_parameters(case: Case, capsys: pytest.CaptureFixture) -> None:
    model = get_peft_model(tiny_model("llama"), case.config())
    trained = sum(shape.numel() for shape in trained_shapes(model).values())
    adapter = sum(parameter.numel() for name, parameter in model.named_parameters() if case.info.prefix in name)
    everything = adapter + sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,d} || all params: {everything:,d} ||")


# transformers' own adapter interface


def test_native_adapters(native: Case, kind: str, tokens: torch.Tensor) -> None:
    model = tiny_model(kind)
    plain = logits(model, tokens)
    keys = set(model.state_dict())
    outputs = {}
    for seed, (name, sizes) in enumerate({"first": {}, "second": larger(native)}.items()):
        model.add_adapter(native.config(**sizes), adapter_name=name)
        model.eval()
        assert model.active_adapters() == [name]
        assert starts_as(native, logits(model, tokens), plain)
        randomize(model, native, seed=seed)
        outputs[name] = logits(model, tokens)
    assert not near(outputs["first"], outputs["second"], DIFFERENT)

    model.set_adapter("first")
    assert torch.equal(logits(model, tokens), outputs["first"])
    model.disable_adapters()
    assert torch.equal(logits(model, tokens), plain)
    model.enable_adapters()
    assert torch.equal(logits(model, tokens), outputs["first"])
    model.set_adapter(["first", "second"])
    assert not near(logits(model, tokens), outputs["first"], DIFFERENT)

    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"]
    assert torch.equal(logits(model, tokens), outputs["second"])
    model.delete_adapter("second")
    assert torch.equal(logits(model, tokens), plain)
    assert not any(native.info.prefix in key for key in model.state_dict())
    assert {key.replace(".base_layer", "") for key in model.state_dict()} == keys


def test_native_loading_restores_every_saved_tensor(
    native: Case, kind: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny_model(kind)
    model.add_adapter(native.config(), adapter_name="default")
    shift_saved_tensors(model)
    wanted = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path / "native")
    adapted_model = get_peft_model(tiny_model(kind), native.config())
    shift_saved_tensors(adapted_model)
    adapted_model.save_pretrained(tmp_path / "peft")

    for folder in ("native", "peft"):
        for name in ("default", "another"):
            loaded = tiny_model(kind)
            info = loaded.load_adapter(tmp_path / folder, adapter_name=name)
            assert info is None or (not info.missing_keys and not info.unexpected_keys)  # None of older transformers
            assert torch.equal(logits(loaded, tokens), wanted)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(kind), tmp_path / folder), tokens), wanted)
    bare, ours = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("native", "peft"))
    assert bare.keys() == ours.keys() and all(torch.equal(bare[key], ours[key]) for key in ours)


def test_a_bare_model_refuses_an_adapter_with_shared_state(shared: Case, tokens: torch.Tensor) -> None:
    model = tiny_model("llama")
    wanted = logits(model, tokens)
    with pytest.raises(ValueError, match="get_peft_model"):
        model.add_adapter(shared.config())
    assert not tuner_layers(model) and torch.equal(logits(model, tokens), wanted)


def test_auto_classes_load_the_base_and_the_adapter(case: Case, tokens: torch.Tensor, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, case, task_type="CAUSAL_LM")
    shift_saved_tensors(model)
    wanted = logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), tokens), wanted)
    if not case.info.model.uses_shared_state:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert tuner_layers(loaded) and torch.equal(logits(loaded, tokens), wanted)


# PEFT's


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem"])
@pytest.mark.parametrize("is_trainable", [False, True], ids=["", "trainable"])
def test_from_pretrained(
    case: Case, tokens: torch.Tensor, tmp_path: Path, is_trainable: bool, low_cpu_mem_usage: bool
) -> None:
    model = adapted(tiny_model("llama"), case)
    shift_saved_tensors(model)
    model.save_pretrained(tmp_path)
    options = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, **options)
    assert torch.equal(logits(loaded.eval(), tokens), logits(model, tokens))
    assert trained_shapes(loaded) == (trained_shapes(model) if is_trainable else {})
    assert loaded.peft_config["default"].inference_mode is not is_trainable
    if is_trainable:
        wanted, found = gradients(model, tokens), gradients(loaded, tokens)
        assert all(torch.equal(gradient, found[name]) for name, gradient in wanted.items())

    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_adapters_of_different_sizes_are_saved_and_deleted(case: Case, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"), case)
    outputs = {"default": logits(model, tokens)}
    model.add_adapter("large", case.config(**larger(case)))
    assert torch.equal(logits(model, tokens), outputs["default"])
    model.set_adapter("large")
    randomize(model, case, seed=1)
    outputs["large"] = logits(model, tokens)
    assert not near(outputs["default"], outputs["large"], DIFFERENT)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "large", "large")
    for name, wanted in outputs.items():
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, tokens), wanted)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded, tokens), outputs["large"])


def test_merge_and_unload(mergeable: Case, kind: str, tokens: torch.Tensor) -> None:
    base = tiny_model(kind)
    model = adapted(tiny_model(kind), mergeable, target_modules="all-linear", task_type=TASKS[kind])
    wanted = logits(model, tokens)
    merged = model.merge_and_unload(safe_merge=True)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert near(logits(merged, tokens), wanted) and not near(logits(base, tokens), wanted, DIFFERENT)


LORAS = [case for case in CASES if case.is_lora]


@pytest.mark.parametrize("lora_case", LORAS, ids=[case.name for case in LORAS])
@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_adapters(lora_case: Case, combination: str, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model("llama"), lora_case, "first", "second", target_modules=["v_proj"])  # 8 x 16
    options = {"svd_rank": 8} if combination == "svd" else {}
    model.add_weighted_adapter(["first", "second"], [0.7, 0.5], "sum", combination, **options)
    for layer in tuner_layers(model).values():
        first, second, total = (layer.get_delta_weight(name) for name in ("first", "second", "sum"))
        if combination == "cat":  # PEFT joins the factors, which are not all there is to a DoRA
            A, B, s = layer.lora_A, layer.lora_B, layer.scaling
            first, second = (s[name] * B[name].weight @ A[name].weight for name in ("first", "second"))
        if combination == "linear":  # PEFT adds the factors
            s = layer.scaling["first"]
            A, B = (
                (0.7 * s) ** 0.5 * factor["first"].weight + (0.5 * s) ** 0.5 * factor["second"].weight
                for factor in (layer.lora_A, layer.lora_B)
            )
            assert near(total, B @ A)
        else:
            assert near(total, 0.7 * first + 0.5 * second)
    model.set_adapter("sum")
    assert logits(model, tokens).isfinite().all()
    model.delete_adapter("sum")


def test_unload(case: Case, kind: str, tokens: torch.Tensor) -> None:
    base = tiny_model(kind)
    model = adapted(tiny_model(kind), case).unload()
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert torch.equal(logits(model, tokens), logits(base, tokens))


def test_what_cannot_be_merged_says_so_and_stays(unmergeable: Case, kind: str, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model(kind), unmergeable)
    wanted = logits(model, tokens)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=f"{unmergeable.info.peft_type.value}.*cannot be merged.*unload"):
            merge()
    assert torch.equal(logits(model, tokens), wanted)


def test_deepcopy_is_independent(case: Case, kind: str, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model(kind), case)
    wanted = logits(model, tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), wanted)
    randomize(twin, case, seed=7)
    assert not torch.equal(logits(twin, tokens), wanted)
    assert torch.equal(logits(model, tokens), wanted)


def test_a_pickled_model_opens_in_a_process_that_never_imported_us(tokens: torch.Tensor, tmp_path: Path) -> None:
    models = {case.name: adapted(tiny_model("llama"), case) for case in CASES}
    for name, model in models.items():
        torch.save(model, tmp_path / name)
    shutil.copy(EXAMPLES / "my_method.py", tmp_path / "examples_my_method.py")  # the name under which tests import it
    script = """
import sys, torch
outputs = {}
for name in sys.argv[1:]:
    model = torch.load(name, weights_only=False)
    config = model.peft_config["default"]
    assert config.peft_type is type(config.peft_type)(config.peft_type.value), config.peft_type
    outputs[name] = model(torch.load("tokens")).logits
torch.save(outputs, "outputs")
"""
    torch.save(tokens, tmp_path / "tokens")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(EXAMPLES.parent)])}
    subprocess.run([sys.executable, "-c", script, *models], cwd=tmp_path, env=environment, check=True)
    for name, output in torch.load(tmp_path / "outputs").items():
        assert near(output, logits(models[name], tokens))


# Mixed batches


def test_mixed_batch_equals_separate_runs(case: Case, kind: str, tokens: torch.Tensor) -> None:
    base = tiny_model(kind)
    model = adapted(tiny_model(kind), case, "first", "second")
    names = ["second", "__base__", "first"]
    mixed = logits(model, tokens, adapter_names=names)
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        wanted = logits(base if name == "__base__" else model, tokens)[row]
        assert near(mixed[row], wanted)
        other = logits(base if name != "__base__" else model, tokens)[row]
        assert not near(mixed[row], other, DIFFERENT)
    assert near(logits(model, tokens, adapter_names=["first"] * 3), logits(model, tokens))


@pytest.mark.parametrize(("kind", "num_beams"), [("llama", 1), ("llama", 2), ("t5", 2)])
def test_mixed_batch_generates(case: Case, kind: str, tokens: torch.Tensor, num_beams: int) -> None:
    model = adapted(tiny_model(kind), case, "first", "second", target_modules="all-linear")
    options = {"num_beams": num_beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    names = ["second", "__base__", "first"]
    mixed = model.generate(input_ids=tokens, adapter_names=names, **options)
    separate = {}
    with model.disable_adapter():
        separate["__base__"] = model.generate(input_ids=tokens, **options)
    for name in ("first", "second"):
        model.set_adapter(name)
        separate[name] = model.generate(input_ids=tokens, **options)
    for row, name in enumerate(names):
        assert torch.equal(mixed.sequences[row], separate[name].sequences[row])
        rows = slice(row * num_beams, (row + 1) * num_beams)
        assert near(mixed.logits[-1][rows], separate[name].logits[-1][rows])
    wrong = (separate[name].logits[0][0] for name in ("__base__", "first"))
    assert not any(near(mixed.logits[0][0], other, DIFFERENT) for other in wrong)


def test_mixed_batch_errors(case: Case, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model("llama"), case)
    wanted = logits(model, tokens)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(model, tokens, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="non-existing adapter.*nobody"):
        logits(model, tokens, adapter_names=["default", "nobody", "__base__"])
    with pytest.raises(ValueError, match="training mode"):
        logits(model.train(), tokens, adapter_names=["default"] * 3)
    assert torch.equal(logits(model.eval(), tokens), wanted)
    if case.info.mergeable:
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            logits(model, tokens, adapter_names=["default"] * 3)
        model.unmerge_adapter()
        assert near(logits(model, tokens), wanted)


# Numerics


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames gradient checkpointing
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(
    case: Case, kind: str, tokens: torch.Tensor, use_reentrant: bool
) -> None:
    model = adapted(tiny_model(kind), case).train()
    model.config.use_cache = False
    wanted = gradients(model, tokens)
    assert all(gradient.any() for gradient in wanted.values())
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    next(iter(tuner_layers(model).values())).register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, tokens)
    assert len(calls) == 2  # the layer ran again in the backward pass
    assert all(near(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_base(case: Case, kind: str, tokens: torch.Tensor, dtype: torch.dtype) -> None:
    base = tiny_model(kind).to(dtype)
    options, ulp = {"target_modules": "all-linear", "task_type": TASKS[kind]}, torch.finfo(dtype).eps
    fresh = get_peft_model(copy.deepcopy(base), case.config(**options)).eval()
    assert starts_as(case, logits(fresh, tokens), logits(base, tokens))

    model, exact = adapted(base, case, **options), adapted(tiny_model(kind), case, **options)
    trained = [p for name, p in model.named_parameters() if case.info.prefix in name and p.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(g.isfinite().all() and g.any() for g in gradients(model, tokens, loss_scale=2**13).values())
    assert logits(model, tokens).dtype == dtype
    assert near(logits(model, tokens), logits(exact, tokens), 8 * ulp)
    if case.info.mergeable:
        merged = model.merge_and_unload()
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
        assert near(logits(merged, tokens), logits(exact, tokens), 8 * ulp)


def test_autocast(case: Case, kind: str, tokens: torch.Tensor) -> None:
    model = adapted(tiny_model(kind), case, target_modules="all-linear", task_type=TASKS[kind])
    exact, exact_gradients = logits(model, tokens), gradients(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(model, tokens)
        found = gradients(model, tokens)
    assert not torch.equal(rounded, exact) and near(rounded, exact, 0.03)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    exact_gradient, gradient = (torch.cat([g.flatten() for g in gs.values()]) for gs in (exact_gradients, found))
    assert near(gradient, exact_gradient, 0.1)
