"""GGPOCallback's file in a checkpoint is whole, or as it was."""

import resource
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training import trainer

import peftx


def test_a_full_disk_leaves_no_half_of_the_statistics(tmp_path: Path) -> None:
    config = peftx.LoRAGGPOConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    run = trainer(config, tmp_path)
    callback = peftx.GGPOCallback()
    run.add_callback(callback)
    run.train()
    folder = tmp_path / "checkpoint-2"
    path = folder / "ggpo_state.safetensors"
    before, names = path.read_bytes(), {part.name for part in folder.iterdir()}
    assert load_file(path)
    run.state.global_step = 2
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, old[1]))
    try:
        with pytest.raises(OSError, match="free some space and go on from the checkpoint before"):
            callback.on_save(run.args, run.state, run.control, model=run.model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == before and {part.name for part in folder.iterdir()} == names
    callback.on_save(run.args, run.state, run.control, model=run.model)
    assert {part.name for part in folder.iterdir()} == names
