"""`peftx inspect`: every method's files described, and broken ones flagged, without a base model."""

import json
import os
import struct

import peft
import pytest
import torch
from conftest import CASES, adapted, tiny_model, tuner_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peftx.cli import app
from peftx.hub import heat_map, inspect_adapter
from peftx.hub import tensors as stored
from peftx.hub.picture import place

RANKS = {"compacter": 1, "loldu": 2, "krona": 2}  # what the shapes of their tensors say; the others have r=2


def saved(folder, case, **settings):
    base = folder / "base"
    tiny_model("llama").save_pretrained(base)
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    model = adapted(AutoModelForCausalLM.from_pretrained(base), case, **settings)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model


def named(name):
    return next(case for case in CASES if case.name == name)


def test_every_method_is_described_by_its_file_alone_and_on_its_base(case, tmp_path):
    folder, model = saved(tmp_path, case)
    report = inspect_adapter(folder)
    assert (report.method, report.known_by, report.problems) == (case.info.peft_type.value, "peftx", ())
    assert (report.task_type, report.base_model, report.loaded) == ("CAUSAL_LM", str(tmp_path / "base"), False)
    layers = tuner_layers(model)
    assert {module.name for module in report.modules} == layers.keys()
    tensors = load_file(folder / "adapter_model.safetensors")
    assert report.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(report.dtypes.values()) == report.parameters
    assert sum(module.parameters for module in report.modules) + sum(report.others.values()) == report.parameters
    if case.info.name != "triadaptlora":
        assert {module.rank for module in report.modules} == {RANKS.get(case.info.name, 2)}
    for module in report.modules:
        if module.is_delta:
            delta = layers[module.name].get_delta_weight("default")
            assert module.norm == pytest.approx(delta.norm().item(), rel=1e-5)
    loaded = inspect_adapter(folder, load=True)
    assert loaded.loaded and not loaded.problems
    for module in loaded.modules:
        assert module.is_delta == case.info.mergeable or case.lora_export == "dora"
        if case.info.mergeable and case.lora_export != "dora":
            assert module.norm == pytest.approx(layers[module.name].get_delta_weight("default").norm().item(), rel=1e-4)


def test_triadaptloras_ranks_are_those_at_work(tmp_path):
    folder, model = saved(tmp_path, named("triadaptlora"))
    ranks = model.base_model.ranks()
    assert {module.name: module.rank for module in inspect_adapter(folder).modules} == ranks


@pytest.mark.parametrize("method", ["lora", "miss"])
def test_pefts_own_methods_are_described_too(tmp_path, method):
    config = {
        "lora": peft.LoraConfig(
            r=4, use_rslora=True, alpha_pattern={"down_proj": 3}, target_modules=["q_proj", "down_proj"]
        ),
        "miss": peft.MissConfig(r=4, target_modules=["q_proj"]),
    }[method]
    model = peft.get_peft_model(tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert (report.method, report.known_by, report.problems) == (method.upper(), "PEFT", ())
    assert {module.rank for module in report.modules} == {4}
    if method == "lora":
        for module in report.modules:
            delta = tuner_layers(model)[module.name].get_delta_weight("default")
            assert module.norm == pytest.approx(delta.norm().item(), rel=1e-5)


@pytest.mark.parametrize("damage", ["nan", "ranks", "missing", "foreign", "type", "config", "base"])
def test_what_is_wrong_is_said(tmp_path, damage):
    folder, _ = saved(tmp_path, named("allora"))
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    wanted = {
        "nan": f"{key}: 2 of 32 values are not finite",
        "ranks": "lora_A (1, 16) and lora_B (16, 2) have different ranks",
        "missing": "lora_A is missing",
        "foreign": "no tensor in the file is ALLORA's",
        "type": "of the type 'UNHEARD', which neither PEFT",
        "config": "`eta` must be",
        "base": "it does not load",
    }[damage]
    if damage == "nan":
        tensors[key][0, :2] = torch.tensor([float("nan"), float("inf")])
    elif damage == "ranks":
        tensors[key] = tensors[key][:1].clone()
    elif damage == "missing":
        del tensors[key]
    elif damage == "foreign":
        tensors = {"something.weight": torch.ones(2)}
    elif damage == "base":
        tiny_model("gpt2").save_pretrained(tmp_path / "base")
    settings |= {"type": {"peft_type": "UNHEARD"}, "config": {"eta": -1}}.get(damage, {})
    save_file(tensors, weights)
    config.write_text(json.dumps(settings))
    report = inspect_adapter(folder, load=damage == "base")
    assert any(wanted in problem for problem in report.problems) and not report.loaded
    outcome = CliRunner().invoke(app, ["inspect", str(folder), *["--load"] * (damage == "base")])
    assert outcome.exit_code == 1 and "loads" in outcome.output and "no: see below" in outcome.output
    assert f"problem: {report.problems[0]}" in outcome.output


def test_what_cannot_be_read_at_all_is_one_line(tmp_path):
    folder, _ = saved(tmp_path, named("bone"))
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    for message in ("cannot be read", "is not JSON", "not an object", "is 3, not a name", "no adapter_config.json in"):
        outcome = CliRunner().invoke(app, ["inspect", str(folder)])
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1) and message in outcome.stderr
        weights.write_bytes(whole)
        broken = {"cannot be read": "{", "is not JSON": "[1]", "not an object": '{"peft_type": 3}'}.get(message)
        config.write_text(broken or text)
        if message == "is 3, not a name":
            config.unlink()


def test_command_picture_and_json(tmp_path):
    folder, _ = saved(tmp_path, named("bone"))
    picture = tmp_path / "norms.png"
    outcome = CliRunner().invoke(app, ["inspect", str(folder), "--load", "--plot", str(picture)])
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert "BONE, known by peftx arXiv:2409.15371" in outcome.output and "yes, it was loaded" in outcome.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    outcome = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    facts = json.loads(outcome.output)
    assert facts["settings"]["r"] == 2 and len(facts["modules"]) == 4
    heat_map(inspect_adapter(folder), picture)


def test_many_modules_are_told_by_their_kind(tmp_path):
    names = [f"layers.{i}.{kind}" for i in range(21) for kind in ("q", "v")]
    ones = {"A": torch.ones(2, 3), "B": torch.ones(3, 2)}
    write(
        tmp_path / "many",
        LORA,
        {key(name, part): (i + 1) * ones[part] for i, name in enumerate(names) for part in ones},
    )
    outcome = CliRunner().invoke(app, ["inspect", str(tmp_path / "many")])
    rows = [line.split() for line in outcome.output.splitlines() if " x " in line]
    assert [(row[:3], row[3:5]) for row in rows] == [(["21", "x", "q"], ["2", "252"]), (["21", "x", "v"], ["2", "252"])]
    # 2 in each of nine places
    assert [float(value) for value in rows[0][5::2]] == pytest.approx(
        [6, 6 * 41**2], rel=1e-3
    ) and "--layers" in outcome.output
    outcome = CliRunner().invoke(app, ["inspect", str(tmp_path / "many"), "--layers"])
    assert all(name in outcome.output for name in names) and " x " not in outcome.output


def write(folder, config, tensors, metadata=None):
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    if isinstance(tensors, bytes):
        (folder / "adapter_model.safetensors").write_bytes(tensors)
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def key(module, part):
    return f"base_model.model.{module}.lora_{part}.weight"


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}


def raw(header):
    """The bytes of a safetensors file with this header and 16 bytes of tensors."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + bytes(16)


def entry(start, stop, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**62) + b"{}",  # a header of exabytes
        struct.pack("<Q", 10**9) + b"{}",
        raw({"a": entry(0, 8), "b": entry(4, 12)}),  # overlapping
        raw({"a": entry(8, 16)}),  # a hole
        raw({"a": entry(0, 8), "b": entry(8, 24, (4,))}),  # beyond the end
        raw({"a": entry(0, 16, (2**40, 2**40))}),
        raw({"a": entry(0, 16, (-4,))}),
        raw(b'{"a": ' * 5000),
        raw({"a" * 5000: entry(0, 16, (4,))}),
        b"\x80\x04\x95not a pickle either.",
    ],
)
def test_a_malicious_file_of_tensors_is_one_line(tmp_path, content):
    folder = write(tmp_path / "a", LORA, content)
    outcome = CliRunner().invoke(app, ["inspect", str(folder)])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1), outcome
    assert "The tensors of the adapter" in outcome.stderr and "cannot be read" in outcome.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"peft_type": "LORA", "x": "' + "a" * 10_000_000 + '"}', "cannot be the config of an adapter"),
        ('{"peft_type": "LORA", "x": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_a_malicious_config_is_one_line(tmp_path, config, message):
    folder = write(tmp_path / "a", config, {key("q", "A"): torch.ones(2, 3)})
    outcome = CliRunner().invoke(app, ["inspect", str(folder)])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1) and message in outcome.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"base_model_name_or_path": {"a": 1}},
        {"task_type": ["CAUSAL_LM"]},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**300 * 10**300},
        {"lora_alpha": [1]},
        {"alpha_pattern": {"(": 3}},
        {"alpha_pattern": {"(a+)+$": 3}},
        {"alpha_pattern": "q"},
        {"rank_pattern": 3},
        {"layers_replication": 3},
        {"loftq_config": 3, "eva_config": 3, "runtime_config": 3},
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": "VERA", "target_modules": {}},
        {"peft_type": "BONE", "r": "x"},
    ],
    ids=str,
)
def test_a_config_of_nonsense_is_reported_without_a_traceback(tmp_path, change):
    tensors = {
        key("model.layers.0." + "a" * 40, "A"): torch.ones(2, 3),
        key("model.layers.0." + "a" * 40, "B"): torch.ones(3, 2),
    }
    folder = write(tmp_path / "a", {**LORA, **change}, tensors)
    outcome = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert outcome.exit_code in (0, 1) and isinstance(outcome.exception, SystemExit | None), outcome.exception
    json.loads(outcome.output, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_rank_without_end_or_none_takes_no_memory(tmp_path):
    wide = 100_000  # r x r in float64 were 80 GB
    tensors = {key("q", "A"): torch.ones(wide, 1), key("q", "B"): torch.ones(1, wide)}
    (module,) = inspect_adapter(write(tmp_path / "a", LORA | {"lora_alpha": wide}, tensors)).modules
    assert (module.rank, module.norm) == (wide, pytest.approx(wide))
    tensors = {key("q", "A"): torch.ones(0, 3), key("q", "B"): torch.ones(3, 0)}
    report = inspect_adapter(write(tmp_path / "b", LORA, tensors))
    assert any("different ranks, or none" in problem for problem in report.problems)


def test_a_large_file_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "BLOCK", 100)
    torch.manual_seed(0)
    tensors = {
        key("q", "A"): torch.randn(2, 300),
        key("q", "B"): torch.randn(70, 2),
        "base_model.model.head": torch.randn(50, 30),
    }
    tensors["base_model.model.head"][49, 29] = float("nan")
    tensors["base_model.model.scale"] = torch.tensor(2.0)
    seen = []
    survey = stored.blocks
    monkeypatch.setattr(stored, "blocks", lambda tensor: (seen.append(b.numel()) or b for b in survey(tensor)))
    report = inspect_adapter(write(tmp_path / "a", LORA | {"lora_alpha": 4}, tensors))
    assert max(seen) <= 300 and sum(seen) == report.parameters
    assert [line for line in report.problems if "head: 1 of 1500 values are not finite" in line]
    delta = 2 * tensors[key("q", "B")].double() @ tensors[key("q", "A")].double()
    assert report.modules[0].norm == pytest.approx(delta.norm().item())


def test_what_a_file_says_cannot_command_the_terminal(tmp_path):
    name = "q.\x1b[2J\x1b]0;owned\x07.[bold red]x[/].:warning:.\u202eevil"
    tensors = {key(name, "A"): torch.ones(2, 3), key(name, "B"): torch.ones(3, 2) * float("inf")}
    folder = write(tmp_path / "a", LORA | {"base_model_name_or_path": "../../etc/\x1b[31mpasswd"}, tensors)
    picture = tmp_path / "a.png"
    outcome = CliRunner().invoke(app, ["inspect", str(folder), "--plot", str(picture)], env={"COLUMNS": "300"})
    assert outcome.exit_code == 1 and picture.is_file()
    assert "\x1b" not in outcome.output and "\x07" not in outcome.output and "\u202e" not in outcome.output
    for shown in (r"\x1b[2J", "[bold red]x[/]", ":warning:", r"../../etc/\x1b[31mpasswd"):
        assert shown in outcome.output
    write(folder, LORA | {"peft_type": "\x1b[2J"}, b"")
    assert "\x1b" not in CliRunner().invoke(app, ["inspect", str(folder)]).output


def test_fields_that_stand_in_a_config_twice_are_told(tmp_path):
    tensors = {key("q", "A"): torch.ones(2, 3), key("q", "B"): torch.ones(3, 2)}
    text = json.dumps(LORA)[:-1] + ', "peft_type": "LORA", "r": 2}'
    report = inspect_adapter(write(tmp_path / "a", text, tensors))
    assert [line.split()[0] for line in report.problems] == ["'peft_type'", "'r'"]


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    folder = write(tmp_path / "a", LORA, {key("q", "A"): torch.ones(2, 3)})
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors in it"):
        inspect_adapter(folder)


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        (peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]), {4}),
        (peft.VeraConfig(r=4, target_modules=["q_proj"]), {4}),
        (peft.AdaLoraConfig(total_step=9, init_r=4, target_modules=["q_proj"]), {4}),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), {None}),
        (peft.LoHaConfig(r=3, rank_pattern={"layers.1.self_attn.q_proj": 2}, target_modules=["q_proj"]), {3, 2}),
        (peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"]), {None}),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), set()),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), set()),
        (peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=2), set()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_pefts_own_methods_count_as_rank(tmp_path, config, ranks):
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert (report.problems, {module.rank for module in report.modules}) == ((), ranks)
    assert all(
        module.is_delta is (type(config) is peft.LoraConfig and not config.use_dora) for module in report.modules
    )
    outcome = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output


def test_a_convolution_in_groups_is_no_mismatch(tmp_path):
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    with pytest.warns(UserWarning, match="groups > 1"):
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert not report.problems and [(module.rank, module.is_delta) for module in report.modules] == [(4, False)]


def test_two_stacks_of_layers_have_their_own_columns(tmp_path, monkeypatch):
    model = peft.get_peft_model(tiny_model("t5"), peft.LoraConfig(r=2, target_modules=["q"]))
    model.save_pretrained(tmp_path)
    labels = []
    from matplotlib.axes import Axes

    ticks = Axes.set_xticks
    monkeypatch.setattr(
        Axes, "set_xticks", lambda axes, at, names, **kw: labels.extend(names) or ticks(axes, at, names, **kw)
    )
    heat_map(inspect_adapter(tmp_path), tmp_path / "norms.png")
    stacks = ("encoder.block.*.layer.0.SelfAttention", "decoder.block.*.layer.0.SelfAttention")
    assert set(labels) == {f"{stack}.q" for stack in (*stacks, "decoder.block.*.layer.1.EncDecAttention")}


def test_nothing_to_draw_is_said(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING changes no module"):
        heat_map(inspect_adapter(tmp_path), tmp_path / "a.png")


def test_places_in_a_model():
    assert place("model.layers.3.self_attn.q_proj") == (3, "self_attn.q_proj")
    assert place("h.10") == (10, "h")
    assert place("classifier") == (-1, "classifier")
