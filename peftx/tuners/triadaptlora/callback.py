"""Growth in the transformers Trainer."""

from __future__ import annotations

import warnings
from typing import Any

from transformers.trainer_callback import TrainerCallback

from .config import TriAdaptLoRAConfig
from .growth import (
    add_orthogonality_gradient,
    check_unsharded,
    entry,
    found_driver,
    trained_adapters,
    tuner_of,
    update_and_grow,
)


class TriAdaptCallback(TrainerCallback):
    """Lets the ranks of TriAdaptLoRA adapters grow in the transformers Trainer.

    It sets the config's `total_step`, where that is `None`, to the optimizer steps of this training, calls
    `update_and_grow` after each of them, and writes the ranks at the start and after each growth to
    `trainer.state.log_history`, which is in every checkpoint and which `plot_ranks` takes.

    Raises:
        ValueError: at the start of the training, if the model has no TriAdaptLoRA adapter, or one whose warm-up is
            longer than the training.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuner = tuner_of(model)
        configs = {
            name: config
            for name, config in getattr(tuner, "peft_config", {}).items()
            if isinstance(config, TriAdaptLoRAConfig) and trained_adapters(tuner, name)
        }
        if not configs:
            raise ValueError("TriAdaptCallback: the model trains no TriAdaptLoRA adapter. Leave the callback out.")
        check_unsharded(tuner)
        for name, config in configs.items():
            if config.total_step is None:
                config.check_total_step(state.max_steps)
            elif config.total_step != state.max_steps:
                warnings.warn(
                    f"The TriAdaptLoRA adapter {name!r} grows as planned for total_step={config.total_step}, but this "
                    f"training has {state.max_steps} optimizer steps. Set `total_step=None` to plan anew.",
                    stacklevel=2,
                )
        self._planned = [config for config in configs.values() if config.total_step is None]
        for config in self._planned:
            config.total_step = state.max_steps
        found_driver(tuner)
        if state.global_step == 0:
            self._log(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for config in self._planned:  # the next training may have another length
            config.total_step = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        add_orthogonality_gradient(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if update_and_grow(model, state.global_step):
            self._log(state, model)

    def _log(self, state: Any, model: Any) -> None:
        tuner = tuner_of(model)
        for adapter_name in tuner.peft_config:
            ranks = {name: adapter.rank for name, adapter in trained_adapters(tuner, adapter_name).items()}
            if ranks:
                epoch = {} if state.epoch is None else {"epoch": round(state.epoch, 4)}
                state.log_history.append({**entry(state.global_step, adapter_name, ranks), **epoch})
