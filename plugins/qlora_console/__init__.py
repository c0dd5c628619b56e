"""Callbacks `progress`, `early_stopping` and `transformers` (any TrainerCallback integration). Light: imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qlora_core.errors import ConfigError, Problem
from qlora_core.hooks import hookimpl
from qlora_core.providers import CallbackFactory, ProviderOptions

if TYPE_CHECKING:
    import transformers

    from qlora_core.run import Run


class Progress(CallbackFactory):
    """A live bar with time left, loss, tokens per second and peak memory; plain lines where there is no terminal."""

    name = "progress"

    def build(self, run: Run) -> transformers.TrainerCallback:
        """Return the display; it is silent for a quiet run."""
        from qlora_console.progress import ProgressDisplay

        return ProgressDisplay(quiet=run.quiet)


class EarlyStoppingOptions(ProviderOptions):
    """What `early_stopping` accepts."""

    patience: int = Field(3, ge=1, description="evaluations without improvement after which training stops")
    min_delta: float = Field(0.0, ge=0, description="an improvement of the evaluation loss, nats per token, counts beyond this")


class EarlyStopping(CallbackFactory):
    """Stops when the evaluation loss no longer falls; use `training.keep: best` to keep the best weights."""

    name = "early_stopping"
    needs_evaluation = True
    Options = EarlyStoppingOptions
    options: EarlyStoppingOptions

    def build(self, run: Run) -> transformers.TrainerCallback:
        """Return transformers' own callback."""
        from transformers import EarlyStoppingCallback

        return EarlyStoppingCallback(self.options.patience, self.options.min_delta)


class IntegrationOptions(ProviderOptions):
    """What `transformers` accepts."""

    integration: str = Field(
        min_length=1, description="an integration of transformers (tensorboard, wandb, mlflow, ...), or module:Class"
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="arguments of the callback's constructor")


class Integration(CallbackFactory):
    """A bridge to any `transformers.TrainerCallback`: those that transformers lists, or one by module:Class."""

    name = "transformers"
    Options = IntegrationOptions
    options: IntegrationOptions

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        """Return one that needs no further package."""
        return {"integration": "transformers:PrinterCallback"}

    def check_libraries(self) -> None:
        """Refuse an integration that does not exist or whose package is not installed."""
        try:
            self._make()
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError([Problem(("integration",), f"{self.options.integration!r} can't be used: {error}")]) from error

    def build(self, run: Run) -> transformers.TrainerCallback:
        """Return a new callback."""
        return self._make()

    def _make(self) -> transformers.TrainerCallback:
        from qlora_console.integrations import find

        return find(self.options.integration)(**self.options.arguments)


@hookimpl
def qlora_callbacks() -> list[type[CallbackFactory]]:
    """Provide `progress`, `early_stopping` and `transformers`."""
    return [Progress, EarlyStopping, Integration]
