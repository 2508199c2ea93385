"""After SFT, the reference of DPO, KTO, GRPO and RLOO is the trained adapter: all that decides what it computes."""

import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import CASES, SMALL, Case, randomize
from runs import TEMPLATE, base, config, datasets, driver, logged, make, rows, tokenizer, trained, values

pytestmark = pytest.mark.trl
LN2 = pytest.approx(math.log(2), abs=5e-6)  # passes with and without gradients round differently


def test_trained_tokens(case: Case, tmp_path: Path) -> None:
    """Rows of the embeddings, whose parameters TRL does not copy. LoRA's own first loss is not ln 2 there."""
    model = trained(case, "DPO", trainable_token_indices=[5, 6, 7])
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    run = make("DPO", tmp_path, model, callbacks=driver(case), max_steps=3)
    start = {key: tensor for key, tensor in values(model).items() if ".ref" in key}
    assert any("trainable_tokens_delta" in key for key in start)
    run.train()
    assert logged(run)[0] == LN2 and logged(run)[1] != LN2
    after = values(model)
    assert all(torch.equal(after[key], tensor) for key, tensor in start.items())


def test_trained_heads(case: Case, tmp_path: Path) -> None:
    model = trained(case, "DPO", modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    run = make("DPO", tmp_path, model, callbacks=driver(case), max_steps=2)
    run.train()
    assert logged(run)[0] == LN2


def test_precomputed_log_probabilities(case: Case, tmp_path: Path) -> None:
    once = make("DPO", tmp_path, trained(case, "DPO"), callbacks=driver(case), precompute_ref_log_probs=True)
    once.train()
    each = make("DPO", tmp_path, trained(case, "DPO"), callbacks=driver(case))
    each.train()
    assert logged(once)[0] == LN2 and logged(once) == pytest.approx(logged(each), abs=1e-5)


def reaches_experts(case: Case) -> bool:
    if not case.info.experts or case.name == "bone-bat":
        return False
    try:
        case.config(target_parameters=["up_proj"])
    except ValueError:  # GGPO's noise
        return False
    return True


@pytest.mark.parametrize("some", [case for case in CASES if reaches_experts(case)], ids=lambda case: case.name)
def test_fused_experts(some: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {**SMALL, "num_key_value_heads": 2, "head_dim": 4, "moe_intermediate_size": 8, "pad_token_id": 0}
    moe = transformers.Qwen3MoeConfig(**settings, num_experts=4, num_experts_per_tok=2)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    chosen = some.config(target_modules=["q_proj"], target_parameters=names, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.Qwen3MoeForCausalLM(moe), chosen)
    randomize(model, some, std=0.05)
    run = make("DPO", tmp_path, model, callbacks=driver(some), max_steps=2, router_aux_loss_coef=0.0)
    run.train()
    assert logged(run)[0] == LN2


def test_a_chat_template_with_new_tokens(case: Case, tmp_path: Path) -> None:
    """TRL trains the rows of tokens that a template brings, after which DPO starts from what SFT has made."""
    from trl import clone_chat_template

    other = tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    other.chat_template = TEMPLATE.replace("w60", "<|user|>")
    other.save_pretrained(tmp_path / "other")
    model, mine, added = clone_chat_template(base("SFT"), tokenizer(), str(tmp_path / "other"))
    assert added and mine.chat_template == other.chat_template
    chosen = config(case, "SFT", trainable_token_indices={"embed_tokens": added})
    chats = [{"messages": row["prompt"] + row["chosen"]} for row in rows("DPO", chat=True)]
    options: dict[str, Any] = {"tokens": mine, "callbacks": driver(case), "learning_rate": 0.1}
    data = datasets.Dataset.from_list(chats)
    run = make("SFT", tmp_path / "sft", model, data, peft_config=chosen, assistant_only_loss=True, **options)
    rows_before = {key: tensor for key, tensor in values(run.model).items() if "tokens_delta" in key}
    run.train()
    assert any(not torch.equal(values(run.model)[key], tensor) for key, tensor in rows_before.items())
    second = make("DPO", tmp_path / "dpo", run.model, rows("DPO", chat=True), max_steps=2, **options)
    second.train()
    assert logged(second)[0] == LN2


@pytest.mark.parametrize("mode", ["ggpo", "mgpo"])
def test_references_and_answers_are_not_perturbed(mode: str, tmp_path: Path) -> None:
    """The reference warned after 20 passes that it has no statistics; noise was drawn for every generated token."""
    (case,) = [case for case in CASES if case.name == f"lora-{mode}"]
    settings = {"ggpo_sigma": 0.5} if mode == "ggpo" else {"mgpo_rho": 0.5}
    for name, steps in (("DPO", 24), ("GRPO", 4)):
        model = trained(case, name, auto_update=True, **settings)
        seen: list[tuple[bool, torch.Tensor]] = []
        callback = Probe(seen)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="LORAGGPO")
            make(name, tmp_path / name, model, callbacks=[*driver(case), callback], max_steps=steps).train()
        assert len(seen) == steps
        quiet, loud = ([diff for same, diff in seen[2:] if same is flag] for flag in (True, False))
        assert not loud and all(float(diff) > 1e-4 for diff in quiet)


class Probe(transformers.TrainerCallback):
    """Whether passes without gradients are those of the trained weights, and how far those with gradients are off."""

    def __init__(self, seen: list[tuple[bool, torch.Tensor]]) -> None:
        self.seen = seen

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        x = torch.arange(1, 9)[None]
        assert model.training
        learning = model(x).logits.detach()
        with torch.no_grad():
            answering = model(x).logits
            model.eval()
            weights = model(x).logits
            model.train()
        self.seen.append((torch.equal(answering, weights), (learning - weights).abs().max()))


def test_a_first_adapter_has_the_base_as_its_reference(case: Case, tmp_path: Path) -> None:
    run = make("DPO", tmp_path, base("DPO"), peft_config=config(case, "DPO"), callbacks=driver(case), max_steps=2)
    run.train()
    assert list(run.model.peft_config) == ["default"]
    assert logged(run)[0] == pytest.approx(math.log(2), abs=1e-6 if case.info.exact_start else 1e-4)
