"""Networks of diffusers: what `save_lora_adapter` writes is a LoRA that diffusers loads, with or without peftx."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, randomize

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install diffusers)")
pytestmark = pytest.mark.diffusers
FILE = {"weight_name": "pytorch_lora_weights.safetensors"}  # which offline diffusers does not guess
LINEAR = ["to_q", "to_v", "ff.net.2"]


def network() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def image(unet: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 12, generator=draw)
    with torch.no_grad():
        return unet(x, torch.tensor([3, 7]), encoder_hidden_states=text).sample


def adapted(case: Case, **settings: Any) -> Any:
    unet = network()
    unet.add_adapter(case.config(**{"target_modules": LINEAR, **settings}))
    randomize(unet, case)
    return unet.eval()


def kept(unet: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {key: t.clone() for key, t in unet.state_dict().items()}, unet.peft_config["default"].to_dict()


STOCK = """
import sys, torch, diffusers
unet = diffusers.UNet2DConditionModel.from_pretrained(sys.argv[1]).eval()
unet.load_lora_adapter(sys.argv[2], prefix=None, weight_name="pytorch_lora_weights.safetensors")
x, text, wanted = torch.load(sys.argv[3])
found = unet(x, torch.tensor([3, 7]), encoder_hidden_states=text).sample
assert "peftx" not in sys.modules and torch.allclose(found, wanted, atol=1e-4), (found - wanted).abs().max()
"""


def has_a_form(case: Case) -> bool:
    return case.lora_export in ("exact", "dora")


def test_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    if case.info.model.uses_shared_state:
        with pytest.raises(Exception, match=r"get_peft_model|shared"):
            network().add_adapter(case.config(target_modules=LINEAR))
        return
    unet = adapted(case)
    wanted, before = image(unet), kept(unet)
    assert not torch.allclose(wanted, image(network()), atol=1e-3)
    if not has_a_form(case):
        with pytest.raises(NotImplementedError, match=r"its own loader refuses: .*get_peft_model.*PeftModel.from_"):
            unet.save_lora_adapter(tmp_path)
        assert not list(tmp_path.iterdir())
    else:
        unet.save_lora_adapter(tmp_path)
        loaded = network()
        loaded.load_lora_adapter(tmp_path, prefix=None, **FILE)
        assert loaded.peft_config["default_0"].peft_type == "LORA"
        torch.testing.assert_close(image(loaded.eval()), wanted, rtol=1e-4, atol=1e-4)
    after = kept(unet)
    assert all(torch.equal(tensor, before[0][key]) for key, tensor in after[0].items()) and after[1] == before[1]
    assert torch.equal(image(unet), wanted)


def test_ranks_and_scales_of_single_modules(case: Case, tmp_path: Path) -> None:
    if not has_a_form(case) or "rank_pattern" not in case.config().to_dict():
        pytest.skip("no file, or one rank")
    pattern = {"rank_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 4}}
    unet = adapted(case, **pattern)
    wanted = image(unet)
    unet.save_lora_adapter(tmp_path, upcast_before_saving=True)
    loaded = network()
    loaded.load_lora_adapter(tmp_path, prefix=None, adapter_name="mine", **FILE)
    torch.testing.assert_close(image(loaded.eval()), wanted, rtol=1e-4, atol=1e-4)
    if case.lora_export == "dora":  # whose magnitudes no scale takes away
        return
    loaded.set_adapters("mine", 0.0)
    assert torch.allclose(image(loaded), image(network()), atol=1e-5)


def test_convolutions(case: Case, tmp_path: Path) -> None:
    if "Conv2d" not in case.info.layer_types:
        pytest.skip("has no form for convolutions")
    unet = adapted(case, target_modules=["conv1", "conv2", "conv_shortcut", "to_q"])
    wanted = image(unet)
    unet.save_lora_adapter(tmp_path)
    loaded = network()
    loaded.load_lora_adapter(tmp_path, prefix=None, **FILE)
    torch.testing.assert_close(image(loaded.eval()), wanted, rtol=1e-3, atol=1e-3)


def test_stock_diffusers_loads_it(tmp_path: Path) -> None:
    """Another process, which never imports peftx."""
    from conftest import CASES

    network().save_pretrained(tmp_path / "unet")
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 12, generator=draw)
    for name in ("flora", "gradnormlorp"):
        (case,) = [case for case in CASES if case.name == name]
        unet = adapted(case)
        unet.save_lora_adapter(tmp_path / name)
        torch.save((x, text, image(unet)), tmp_path / "wanted")
        arguments = [tmp_path / "unet", tmp_path / name, tmp_path / "wanted"]
        run = subprocess.run([sys.executable, "-c", STOCK, *map(str, arguments)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def test_the_second_of_two_adapters(tmp_path: Path) -> None:
    from conftest import CASES

    (case,) = [case for case in CASES if case.name == "flora"]
    unet = adapted(case)
    unet.add_adapter(case.config(target_modules=["to_k"]), adapter_name="second")
    randomize(unet, case, seed=2)
    wanted = image(unet.eval())
    unet.save_lora_adapter(tmp_path, adapter_name="second")
    loaded = network()
    loaded.load_lora_adapter(tmp_path, prefix=None, **FILE)
    torch.testing.assert_close(image(loaded.eval()), wanted, rtol=1e-4, atol=1e-4)
