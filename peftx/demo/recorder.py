"""What a training of the demo leaves: losses and CPU seconds."""

import time
from collections.abc import Callable

from transformers import TrainerCallback

Watch = Callable[[str, int, int, float], None]  # method, step, steps, training loss


class Recorder(TrainerCallback):
    """Keeps the loss and the CPU seconds of every step, and tells the watcher."""

    def __init__(self, name: str, watch: Watch):
        self.name, self.watch = name, watch
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.started)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.watch(self.name, state.global_step, state.max_steps, self.losses[-1])
