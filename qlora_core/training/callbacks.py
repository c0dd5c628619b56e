"""What the training loop itself asks for at the end of a step or an evaluation: a line in the log, evaluation, a checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import transformers

__all__ = ["EvaluateBeforeSaving", "KeepBest", "LogLastStep"]

logger = logging.getLogger("qlora_core")


class EvaluateBeforeSaving(transformers.TrainerCallback):
    """Lets the evaluation of an epoch come with its last step, whose checkpoint would else be without it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation now."""
        if self._is_due(args, state):
            control.should_evaluate = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Don't evaluate once more."""
        if self._is_due(args, state):
            control.should_evaluate = False

    @staticmethod
    def _is_due(args: Any, state: Any) -> bool:
        ends = state.global_step >= state.max_steps or float(state.epoch).is_integer()
        return bool(ends and args.eval_strategy == "epoch" and args.eval_delay <= state.epoch)


class LogLastStep(transformers.TrainerCallback):
    """Logs the last step too, whatever the interval, so that no loss goes unreported, and says where there is none to come."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn of a run that is resumed from beyond its end."""
        if state.global_step > state.max_steps and state.is_world_process_zero:
            words = "nothing is left to train: the checkpoint is of step %d, and the run ends at step %d"
            logger.warning(words, state.global_step, state.max_steps)

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
