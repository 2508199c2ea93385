"""Every verb of PEFT's on every method: it does what it says, or is refused; `python tests/adapters/test_verb_table.py`
prints the table that verbs.md and the documentation show."""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import peft
import pytest
import torch
import transformers
from conftest import CASES, Case, adapted, logits, tiny_model, tuner_layers, words

import peftx

PAGE = Path(__file__).parent / "verbs.md"
TARGETS = ["q_proj", "v_proj"]
TOKENS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(0))
VERBS: dict[str, Callable[[Case, Path], None]] = {}


OF_DELTAS: set[str] = set()  # where a method's modes may differ


def verb(name: str, of_deltas: bool = False) -> Callable:
    def decorate(check: Callable[[Case, Path], None]) -> Callable:
        VERBS[name] = check
        OF_DELTAS.update([name] * of_deltas)
        return check

    return decorate


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def llama(case: Case, *names: str, **config) -> peft.PeftModel:
    return adapted(tiny_model("llama"), case, *names, **{"target_modules": TARGETS, **config})


def tied() -> transformers.PreTrainedModel:
    base = tiny_model("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return base


def saved(case: Case, folder: Path, *names: str) -> tuple[list[Path], list[torch.Tensor]]:
    """Folders of adapters, and what they compute."""
    model, outputs = llama(case, *names), []
    for name in names:
        model.set_adapter(name)
        outputs.append(logits(model, TOKENS))
    model.save_pretrained(folder)
    return [folder / name for name in names], outputs


@verb("`merge_adapter`, `unmerge_adapter`, `merge_and_unload`", of_deltas=True)
def merging(case: Case, folder: Path) -> None:
    model = llama(case, "a", "b")
    wanted = logits(model, TOKENS)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["b"]
    near(logits(model, TOKENS), wanted)
    model.unmerge_adapter()
    near(logits(model, TOKENS), wanted)
    near(logits(model.merge_and_unload(), TOKENS), wanted)


@verb("`get_layer_status`, `get_model_status`")
def status(case: Case, folder: Path) -> None:
    model = llama(case, "a", "b")
    found, layers = model.get_model_status(), model.get_layer_status()
    assert found.available_adapters == ["a", "b"] and found.active_adapters == ["b"] and found.enabled
    assert {*found.peft_types.values()} == {case.info.peft_type.value} and found.num_adapter_layers == len(layers) == 4
    assert not found.requires_grad["a"] and found.requires_grad["b"]  # "irregular" where a part is frozen
    assert found.trainable_params == model.get_nb_trainable_parameters()[0]
    assert [layer.name.rpartition("layers.")[2] for layer in layers] == [
        name.rpartition("layers.")[2] for name in tuner_layers(model)
    ]


@verb("`set_requires_grad`")
def requires_grad(case: Case, folder: Path) -> None:
    model = llama(case, "a", "b")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.set_requires_grad("b", False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad(["a", "b"])
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found == trained | {re.sub(r"\.b(\.|$)", r".a\1", name) for name in trained}


@verb("`delete_adapter`")
def deleting(case: Case, folder: Path) -> None:
    model = llama(case, "a", "b")
    wanted = logits(model, TOKENS)
    model.delete_adapter("a")
    assert {*model.peft_config} == {"b"} and torch.equal(logits(model, TOKENS), wanted)
    assert not any(".a." in f"{name}." for name, _ in model.named_parameters())


@verb("`peftx.rescale_adapter_scale`")
def rescaling(case: Case, folder: Path) -> None:
    model = llama(case)
    wanted = logits(model, TOKENS)
    with model.disable_adapter():
        base = logits(model, TOKENS)
    with peftx.rescale_adapter_scale(model, 0.0):
        found = logits(model, TOKENS)
    if case.lora_export == "dora":  # as with PEFT's DoRA, the magnitudes stay
        assert not torch.equal(found, wanted)
    else:
        near(found, base)
    assert torch.equal(logits(model, TOKENS), wanted)


def weighted(case: Case, kind: str, folder: Path) -> None:
    model = llama(case, "a", "b")
    options = {} if kind in ("svd", "cat", "linear") else {"density": 0.6}
    if kind == "svd":
        options["svd_rank"] = 8  # of matrices of rank 8 and 16: nearly or quite all
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=kind, **options)
    if kind in ("svd", "cat") and case.lora_export != "dora":
        for layer in tuner_layers(model).values():
            a, b, found = (layer.get_delta_weight(name) for name in "abc")
            wanted = 0.7 * a - 0.4 * b
            if kind == "svd":
                U, S, Vh = torch.linalg.svd(wanted, full_matrices=False)
                wanted = (U[:, :8] * S[:8]) @ Vh[:8]
            near(found, wanted)
    model.set_adapter("c")
    wanted = logits(model, TOKENS)
    if kind not in ("svd", "cat"):
        return
    model.save_pretrained(folder, selected_adapters=["c"])
    near(logits(peft.PeftModel.from_pretrained(tiny_model("llama"), folder / "c").eval(), TOKENS), wanted)


@verb("`add_weighted_adapter` of deltas (`svd`, `ties_svd`, ...)", of_deltas=True)
def sums_of_deltas(case: Case, folder: Path) -> None:
    for kind in ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"):
        weighted(case, kind, folder / kind)


@verb("`add_weighted_adapter` of factors (`cat`, `linear`, `ties`, ...)", of_deltas=True)
def sums_of_factors(case: Case, folder: Path) -> None:
    for kind in ("cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        weighted(case, kind, folder / kind)


@verb("`trainable_token_indices`")
def rows(case: Case, folder: Path) -> None:
    model = llama(case, trainable_token_indices=[3, 5])
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            assert parameter.requires_grad and parameter.shape == (2, 16)
            parameter.data += 1
    wanted = logits(model, TOKENS)
    model.save_pretrained(folder)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_model("llama"), folder).eval(), TOKENS), wanted)


@verb("`ensure_weight_tying` of `modules_to_save` and of rows")
def tied_heads(case: Case, folder: Path) -> None:
    for options in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 5]}):
        model = peft.get_peft_model(tied(), case.config(target_modules=TARGETS, ensure_weight_tying=True, **options))
        wrapped = model.get_input_embeddings(), model.get_output_embeddings()
        if "modules_to_save" in options:
            weights = [module.modules_to_save["default"].weight for module in wrapped]
        else:
            weights = [module.token_adapter.trainable_tokens_delta["default"] for module in wrapped]
        assert weights[0] is weights[1]


@verb("`ensure_weight_tying` of targets")
def tied_targets(case: Case, folder: Path) -> None:
    config = case.config(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = peft.get_peft_model(tied(), config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.lora_embedding_A["default"].data_ptr() == head.lora_B["default"].weight.data_ptr()


@verb("`layer_replication`")
def replication(case: Case, folder: Path) -> None:
    model = llama(case, layer_replication=[(0, 2), (1, 2)])
    layers = [layer.self_attn.q_proj for layer in model.base_model.model.model.layers]
    assert layers[1].base_layer.weight is layers[2].base_layer.weight
    own = {id(p) for p in layers[1].parameters()} & {id(p) for p in layers[2].parameters()}
    assert own == {id(p) for p in layers[1].base_layer.parameters()}
    logits(model, TOKENS)
    with pytest.raises(NotImplementedError):
        model.merge_adapter()


@verb("`peftx.hotswap`")
def swapping(case: Case, folder: Path) -> None:
    (first, second), (_, wanted) = saved(case, folder, "a", "b")
    model = peft.PeftModel.from_pretrained(tiny_model("llama"), first).eval()
    places = {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    peftx.hotswap(model, second)
    assert torch.equal(logits(model, TOKENS), wanted)
    assert places == {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@verb("transformers' `add_adapter`, `load_adapter`, `delete_adapter`")
def native(case: Case, folder: Path) -> None:
    model = tiny_model("llama")
    model.add_adapter(case.config(target_modules=TARGETS), "new")  # PEFT refuses shared state here
    folders, outputs = saved(case, folder, "a", "b")
    for name, path in zip("ab", folders, strict=True):
        model.load_adapter(path, adapter_name=name)
    model.eval()
    for name, wanted in zip("ab", outputs, strict=True):
        model.set_adapter(name)
        assert torch.equal(logits(model, TOKENS), wanted)
    model.delete_adapter(["new", "a"])
    assert torch.equal(logits(model, TOKENS), outputs[1]) and {*model.peft_config} == {"b"}


@verb("`pipeline(folder)`")
def pipelines(case: Case, folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = adapted(base, case, target_modules=TARGETS)
    model.save_pretrained(folder / "adapter")
    found = transformers.pipeline("text-generation", str(folder / "adapter"), tokenizer=words()).model
    assert torch.equal(logits(found, TOKENS), logits(model, TOKENS))


@verb("several methods in one model, by transformers' `add_adapter`")
def several(case: Case, folder: Path) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    (first,), (wanted,) = saved(case, folder, "a")
    model.load_adapter(first, adapter_name="a")
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(1)
    model.add_adapter(config, "lora")
    model.eval()
    (folder / "lora").mkdir()
    model.set_adapter("lora")
    model.save_pretrained(folder / "lora")
    plain.load_adapter(folder / "lora")
    assert torch.equal(logits(model, TOKENS), logits(plain.eval(), TOKENS))
    model.set_adapter("a")
    assert torch.equal(logits(model, TOKENS), wanted)
    model.save_pretrained(folder / "again")
    again = tiny_model("llama")
    again.load_adapter(folder / "again")
    assert torch.equal(logits(again.eval(), TOKENS), wanted)
    model.set_adapter(["a", "lora"])
    both = logits(model, TOKENS)
    assert not torch.equal(both, wanted) and not torch.equal(both, logits(plain, TOKENS))
    model.disable_adapters()
    assert torch.equal(logits(model, TOKENS), logits(tiny_model("llama"), TOKENS))


@verb("PEFT's `mixed=True`")
def mixed(case: Case, folder: Path) -> None:
    peft.get_peft_model(tiny_model("llama"), case.config(target_modules=TARGETS), mixed=True)


@verb("`peft.helpers.rescale_adapter_scale`")
def rescaling_by_peft(case: Case, folder: Path) -> None:
    with peft.helpers.rescale_adapter_scale(llama(case), 0.5):
        pass


@verb("`peft.utils.hotswap.hotswap_adapter`")
def swapping_by_peft(case: Case, folder: Path) -> None:
    saved(case, folder, "default")
    peft.utils.hotswap.hotswap_adapter(llama(case), str(folder), "default")


# How a refusal is known, by a part of its text, and what the page says of it.
REFUSALS = {
    "cannot be merged or converted": "no¹",
    "have no weighted sum": "no¹",
    "is one of LoRA factors: take one": "no²",
    "cannot tie the adapters of tied modules": "no³",
    "Embedding is not supported": "no³",
    "uses shared state": "no⁴",
    "Could not load model": "no⁴",
    "is not compatible with the `PeftMixedModel`": "no⁵",
    "only supported for models with `LoraLayer`s": "no⁶",
    "Hotswapping only supports LORA": "no⁶",
}
NOTES = """\
¹ Its nonlinear bottleneck is no change of a weight: keep the adapter attached; several act together by
`model.base_model.set_adapter([...])`.
² No exact LoRA form: combine by one of the `svd` kinds.
³ Put tied modules into `modules_to_save`, which stay tied, or target one of them.
⁴ PEFT allows tensors that layers share (its rule) in `get_peft_model` and `PeftModel` only.
⁵ A closed list of PEFT's: use transformers' `add_adapter` for each method, or `peft.inject_adapter_in_model`, PEFT's
own methods last.
⁶ PEFT's function knows LoRA's own layers or type only: peftx has one of the same name, or `peftx.hotswap`, for all.
"""


def outcome(name: str, case: Case, folder: Path) -> str:
    try:
        VERBS[name](case, folder)
    except (NotImplementedError, ValueError, TypeError) as error:
        for text, cell in REFUSALS.items():
            if text in str(error):
                return cell
        raise
    return "yes"


def table() -> str:
    """The table as markdown, a row for each verb and a column for each registered method."""
    methods = [info for info in peftx.methods() if info.config.__module__.startswith("peftx.")]
    lines = ["| | " + " | ".join(f"`{info.name}`" for info in methods) + " |", "| --- |" + " --- |" * len(methods)]
    for name in VERBS:
        cells = [cell(name, [case for case in CASES if case.info is info]) for info in methods]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", NOTES])


def cell(name: str, modes: list[Case]) -> str:
    """What a verb does for the first of a method's modes, and for which of the others it does not."""
    found = {}
    for case in modes if name in OF_DELTAS else modes[:1]:
        with tempfile.TemporaryDirectory() as folder:
            found[case.name] = outcome(name, case, Path(folder))
    usual, *_ = found.values()
    return ", ".join([usual, *(f"not `{case}`{cell[2:]}" for case, cell in found.items() if cell != usual)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_says_what_each_verb_does() -> None:
    assert PAGE.read_text() == f"<!-- verbs -->\n{table()}<!-- /verbs -->\n"


@pytest.mark.parametrize("page", [*Path(__file__).parents[2].glob("docs/**/*.md"), PAGE])
def test_other_pages_that_show_the_table_show_this_one(page: Path) -> None:
    shown = re.findall(r"<!-- verbs -->\n(.*?)<!-- /verbs -->", page.read_text(), re.DOTALL)
    assert all(part == PAGE.read_text().partition("\n")[2].rpartition("<!--")[0] for part in shown)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(f"<!-- verbs -->\n{table()}<!-- /verbs -->")
