"""The perturbations in the transformers Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...files import beside, writing
from .schedule import Schedule, schedules, update_ggpo_stats


class GGPOCallback(TrainerCallback, ExportableState):
    """Drives the perturbations of LoRA-GGPO and LoRA-MGPO in `Trainer(callbacks=[peftx.GGPOCallback()])`.

    It takes the statistics from the averaged, unscaled and clipped gradients before each optimizer step, gives mode
    `"mgpo"` the optimizer and `ramp="cosine"` the number of steps, and saves the statistics in each checkpoint
    (`ggpo_state.safetensors`, beside the adapter, which stays a plain LoRA), so that a resumed run goes on as it was.

    Raises:
        ValueError: at the start of the training, where the model trains no LoRA-GGPO adapter.
    """

    file_name = "ggpo_state.safetensors"
    _model: Any = None
    saved: Mapping[str, str] = {}  # file and fingerprint of the last checkpoint, which `trainer_state.json` keeps

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs):
        self._model, self._folder = model, args.output_dir
        found = schedules(model)
        if not found:
            raise ValueError("GGPOCallback: the model trains no LORAGGPO adapter; see `peftx.LoRAGGPOConfig`.")
        for schedule in found:
            schedule.refuse_shards(model)
            schedule.release()
            schedule.driven = True
            schedule.total_step = schedule.config.total_step or state.max_steps
            schedule.attach(optimizer)
            schedule.load_state({}, state.global_step)
        if state.global_step:
            exported = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
            self.saved = exported.get("attributes", {}).get("saved", self.saved)
        if state.global_step and not self._restore(found, args, state.global_step):
            warnings.warn(
                f"GGPOCallback: the checkpoint's {self.file_name} was not found, so the first step is unperturbed. Set "
                "`resume_from_checkpoint` in TrainingArguments to the checkpoint's folder.",
                stacklevel=2,
            )

    def _restore(self, found: list[Schedule], args: Any, step: int) -> bool:
        """Whether a file with the statistics that the checkpoint tells of was found, and loaded."""
        resumed = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else ""
        candidates = [Path(resumed, self.file_name), Path(self.saved.get("file", "")), self._path(step)]
        for path in candidates:
            if path.is_file():
                tensors = load_file(path)
                for schedule in found:
                    schedule.load_state(tensors, step)
                if self._fingerprint(found) == self.saved.get("fingerprint"):
                    return True
                for schedule in found:
                    schedule.load_state({}, step)
        return False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        update_ggpo_stats(model, state.global_step + 1)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        path = self._path(state.global_step)
        if state.is_world_process_zero and path.parent.is_dir():
            tensors = {key: t for schedule in schedules(model) for key, t in schedule.state().items()}
            with writing(path, "go on from the checkpoint before"), beside(path) as draft:
                save_file({key: tensor.clone() for key, tensor in tensors.items()}, draft)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for schedule in schedules(model):
            schedule.release()

    def state(self) -> dict[str, Any]:
        """What Trainer writes to `trainer_state.json` when it saves a checkpoint, and gives back on a resume."""
        found = schedules(self._model) if self._model is not None else []
        if not found:  # before the training
            return {"args": {}, "attributes": {"saved": dict(self.saved)}}
        path = self._path(max((schedule.step for schedule in found), default=0))
        return {"args": {}, "attributes": {"saved": {"file": str(path), "fingerprint": self._fingerprint(found)}}}

    def _path(self, step: int) -> Path:
        return Path(self._folder, f"{PREFIX_CHECKPOINT_DIR}-{step}", self.file_name).absolute()

    @staticmethod
    def _fingerprint(found: list[Schedule]) -> str:
        return "-".join(schedule.fingerprint() for schedule in found)
