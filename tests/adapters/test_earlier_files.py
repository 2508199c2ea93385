"""Adapters that the release before this layout wrote: each was a file of dictionaries keyed by adapter name."""

from pathlib import Path

import peft
import pytest
import torch
from conftest import MLP, Case
from safetensors.torch import load_file

FILES = Path(__file__).parents[1] / "fixtures" / "adapters_0.1"


@pytest.fixture
def base() -> MLP:
    model = MLP()
    model.load_state_dict(load_file(FILES / "base.safetensors"))
    return model.eval()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_earlier_file_loads_and_is_saved_anew(
    case: Case, base: MLP, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    if not (FILES / case.name).exists():
        pytest.skip("the method is not older than the layout")
    io = load_file(FILES / "io.safetensors")
    model = peft.PeftModel.from_pretrained(base, FILES / case.name, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(
        model(io["x"]), io[case.name], rtol=1e-6, atol=1e-6
    )  # products may be taken in another order
    model.save_pretrained(tmp_path)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (FILES / case.name, tmp_path))
    renamed = {type(model.base_model).current_key(key): tensor for key, tensor in old.items()}
    gone, added = (
        {key.rpartition(".")[2] for key in keys} for keys in (renamed.keys() - new.keys(), new.keys() - renamed.keys())
    )
    assert (gone, added) == (
        ({"checksum"}, {"rows", "pivots", "sketch"}) if case.info.name == "loldu" else (set(), set())
    )
    assert all(torch.equal(renamed[key], new[key]) for key in renamed.keys() & new.keys())
