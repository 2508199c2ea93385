"""The progress of a training."""

from transformers.trainer_callback import ProgressCallback


class Progress(ProgressCallback):
    """The Trainer's bar, with the loss in it in place of a line for each log entry."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)
            if state.global_step:  # resumed
                self.training_bar.update(state.global_step)
                self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}")
