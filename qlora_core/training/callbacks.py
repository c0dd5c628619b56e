"""What the training loop itself asks for at the end of a step or an evaluation: a line in the log, a checkpoint."""

from __future__ import annotations

from typing import Any

import transformers

__all__ = ["KeepBest", "LogLastStep"]


class LogLastStep(transformers.TrainerCallback):
    """Logs the last step too, whatever the interval, so that no loss goes unreported."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log line at the end."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class KeepBest(transformers.TrainerCallback):
    """Saves a checkpoint whenever the evaluation loss is the best so far."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Ask for a checkpoint; the Trainer notes the new best only after this call."""
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            control.should_save = True
