"""PEFT's smaller verbs and fields on the methods that own their tensors: done, or refused with the way out."""

import math

import peft
import pytest
import torch
import transformers
from conftest import CASES, MLP, SMALL, Case, adapted, logits, tiny_model, tuner_layers

import peftx

OWN = [case for case in CASES if not case.is_lora]


@pytest.fixture(params=OWN, ids=lambda case: case.name)
def own(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_the_scale_of_an_adapter_changes_for_a_while(mergeable: Case, mlp: MLP) -> None:
    model = adapted(mlp, mergeable, target_modules=["lin1"])
    x, layer = torch.randn(3, 12), model.base_model.model.lin1
    before, inner = model(x), torch.tanh(mlp.lin0(x))
    base, whole = layer.base_layer(inner), layer(inner)
    with peftx.rescale_adapter_scale(model, 0.0):
        if mergeable.lora_export != "dora":
            torch.testing.assert_close(layer(inner), base)
    with peftx.rescale_adapter_scale(model, 2.0):
        if mergeable.lora_export == "exact":
            torch.testing.assert_close(layer(inner), 2 * whole - base)
    assert torch.equal(model(x), before)
    with pytest.raises(TypeError, match="finite number, got nan"), peftx.rescale_adapter_scale(model, math.nan):
        pass


def test_rows_of_the_embeddings_train_and_load(own: Case, tokens: torch.Tensor, tmp_path) -> None:
    config = own.config(target_modules=["q_proj"], trainable_token_indices=[3, 5])
    model = peft.get_peft_model(tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 1
    wanted = logits(model.eval(), tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval(), tokens), wanted)


@pytest.mark.filterwarnings("ignore:You have requested")
def test_modules_to_save_stay_tied(own: Case) -> None:
    base = tiny_model("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = own.config(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = peft.get_peft_model(base, config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [module.modules_to_save["default"].weight for module in (head, embedding)]
    assert weights[0] is weights[1]


def test_layers_are_replicated_but_not_merged(case: Case, tokens: torch.Tensor) -> None:
    base = tiny_model("llama")
    config = case.config(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    model = peft.get_peft_model(base, config)
    assert len(model.base_model.model.model.layers) == 3
    layers = [layer.self_attn.q_proj for layer in model.base_model.model.model.layers]
    assert layers[1].base_layer.weight is layers[2].base_layer.weight
    before = layers[1].base_layer.weight.clone()
    logits(model.eval(), tokens)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError):
            merge()
    assert torch.equal(layers[1].base_layer.weight, before)


NUMBERS = [("alpha", math.nan), ("scale", math.inf), ("lora_alpha", math.nan), ("lora_alpha", 0), ("r", 0)]
NUMBERS += [("lora_dropout", math.nan), ("lora_dropout", -0.5), ("lora_dropout", 1.0), ("flora_dropout", math.nan)]
NUMBERS += [("rank_pattern", {"lin0": 0}), ("alpha_pattern", {"lin0": math.inf}), ("eta", math.nan)]
NUMBERS += [
    ("layers_to_transform", [-1]),
    ("phm_init_range", math.inf),
    ("dropout", math.nan),
    ("growth_end", math.nan),
]
NUMBERS += [("proj_scale", math.nan), ("ggpo_sigma", math.nan), ("target_modules", "(["), ("exclude_modules", "*x")]
NUMBERS += [("rank_pattern", {"([": 2})]


@pytest.mark.parametrize(("field", "value"), NUMBERS, ids=lambda value: str(value))
def test_numbers_and_patterns_are_refused_where_they_are_given(case: Case, field: str, value: object) -> None:
    if field not in case.info.config.__dataclass_fields__:
        return
    with pytest.raises((ValueError, TypeError), match=field):
        case.config(**{field: value})


def test_a_growth_that_can_never_be_is_refused() -> None:
    with pytest.raises(
        ValueError, match="No rank would ever grow: the first growth would come after optimizer step 50"
    ):
        peftx.TriAdaptLoRAConfig(growth_interval=50, total_step=12)
    with pytest.raises(ValueError, match="growth ends at step 4"):
        peftx.TriAdaptLoRAConfig(growth_interval=5, total_step=40, growth_end=0.1)
    peftx.TriAdaptLoRAConfig(growth_interval=5, total_step=40)


@pytest.mark.parametrize("width", [576, 960, 64, 8, 4])
def test_compacter_s_defaults_fit_every_width_that_four_divides(width: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, width))
    peft.get_peft_model(model, peftx.CompacterConfig(target_modules=["0"]))(torch.randn(2, 8)).sum().backward()
    with pytest.raises(ValueError, match="phm_dim=4 does not divide d=577.*; 1 do"):
        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 577)), peftx.CompacterConfig(target_modules=["0"]))


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "circular", "padding": 1}])
def test_allora_refuses_convolutions_that_peft_s_lora_gets_wrong(options: dict) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, **options))
    with pytest.raises(TypeError, match="ignores dilation=.*Use FLoRA"):
        peft.get_peft_model(model, peftx.ALLoRAConfig(r=2, target_modules=["0"]))
    assert type(model[0]) is torch.nn.Conv2d


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_allora_says_why_it_does_not_merge_groups() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    model = peft.get_peft_model(model, peftx.ALLoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(NotImplementedError, match="groups=2.*FLoRA"):
        model.merge_and_unload()


def test_a_safe_merge_is_finite_in_the_dtype_of_the_base(mergeable: Case, mlp: MLP) -> None:
    model = adapted(mlp.half(), mergeable, target_modules=["lin0"])
    weight = model.base_model.model.lin0.base_layer.weight
    before = weight.clone()
    with torch.no_grad():  # the sum is finite in fp32, and not in fp16
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lin0" in name:
                parameter *= 1e6
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(weight, before)


EXPERTS = {"qwen3_moe": ["gate_proj", "up_proj", "down_proj"], "mixtral": ["w1", "w2", "w3"]}


def mixture(kind: str) -> transformers.PreTrainedModel:
    sizes = dict(SMALL, num_key_value_heads=2, head_dim=4, num_experts_per_tok=2, max_position_embeddings=64)
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4))
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=8, decoder_sparse_step=1)
    )


@pytest.mark.parametrize("kind", EXPERTS)
def test_names_of_fused_experts_are_not_passed_over(case: Case, kind: str) -> None:
    model = mixture(kind)
    modules = list(model.modules())
    if case.info.experts and case.name not in ("bone-bat", "lora-ggpo"):
        tuned = peft.get_peft_model(model, case.config(target_modules=["q_proj", *EXPERTS[kind]]))
        kinds = {layer.split(".")[-1] for layer in tuner_layers(tuned)}
        assert {"q_proj", "experts"} <= kinds and len(tuned.base_model.targeted_parameter_names) == 4
        return
    with pytest.raises(
        NotImplementedError,
        match=rf"cannot adapt the fused experts that .*{EXPERTS[kind][0]}.*PEFT's LoRA|init_weights='bat' builds",
    ):
        peft.get_peft_model(model, case.config(target_modules=["q_proj", *EXPERTS[kind]]))
    assert list(model.modules()) == modules
    peft.get_peft_model(model, case.config(target_modules=["q_proj", "o_proj"]))


def test_diffusers_own_saving_is_refused_with_the_way_out(case: Case, tmp_path) -> None:
    if case.info.model.uses_shared_state:
        return  # PEFT refuses it in `add_adapter`
    model = peft.inject_adapter_in_model(case.config(target_modules=["lin0"]), MLP())
    model.peft_config = {"default": case.config(target_modules=["lin0"])}

    def save_lora_adapter() -> dict:  # as diffusers does it
        return peft.get_peft_model_state_dict(model, adapter_name="default")

    with pytest.raises(NotImplementedError, match="get_peft_model.*PeftModel.from_pretrained"):
        save_lora_adapter()
    assert peft.get_peft_model_state_dict(model, adapter_name="default")
