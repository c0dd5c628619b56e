"""What every callback must keep."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_callback import CallbackHandler

from qlora_core.calls import ProviderFailed, watched
from qlora_core.config import RunConfig, TrainingConfig
from qlora_core.pipeline import finetune
from qlora_core.run import Run
from qlora_core.testing.conformance import Conformance
from qlora_core.testing.tiny import LowRank, Plain, Words, tiny_config, tiny_model
from qlora_core.training.arguments import training_arguments

__all__ = ["CallbackConformance"]

EVENTS = ("on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_log", "on_train_end")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what a callback prints from the report."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class CallbackConformance(Conformance):
    """The checks of a callback."""

    kind = "callback"

    def built(self, folder: str) -> tuple[Any, Any]:
        """Return the factory and the callback that it builds for a run in *folder*."""
        factory = self.usable()
        config = RunConfig.parse({"model": str(tiny_model()), "dataset": "words", "output": folder})
        return factory, factory.build(Run(Path(folder), config, quiet=True))

    def test_it_builds_a_trainer_callback(self) -> None:
        """build returns a transformers.TrainerCallback"""
        with tempfile.TemporaryDirectory() as folder:
            _, callback = self.built(folder)
        assert isinstance(callback, transformers.TrainerCallback), f"build returns {callback!r}"

    def test_its_training_arguments_are_known(self) -> None:
        """the training arguments that it asks for are accepted by transformers"""
        wanted = self.usable().training_arguments()
        with tempfile.TemporaryDirectory() as folder:
            made = training_arguments(TrainingConfig(), output=Path(folder), evaluates=True, wanted=wanted)
        assert all(hasattr(made, name) for name in wanted)

    def test_it_survives_an_empty_run(self) -> None:
        """a run that ends before its first step is no error"""
        with tempfile.TemporaryDirectory() as folder, _silence():
            factory, callback = self.built(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model())
            state, control = transformers.TrainerState(), transformers.TrainerControl()
            handler = CallbackHandler([callback], model, None, None, None)
            arguments = training_arguments(TrainingConfig(), output=Path(folder), evaluates=factory.needs_evaluation)
            for event in ("on_init_end", "on_train_begin", "on_train_end"):
                getattr(handler, event)(arguments, state, control)

    def test_it_goes_through_a_run(self) -> None:
        """three steps with an evaluation and a checkpoint go through"""
        with tempfile.TemporaryDirectory() as folder, _silence():
            finished = finetune(
                tiny_config(),
                Plain(),
                LowRank(),
                Words(),
                output=Path(folder) / "run",
                data={"sequence_length": 16},
                training={"max_steps": 3, "logging_steps": 1, "eval_steps": 2},
                callbacks=[self.usable()],
            )
            lines = finished.run.read_metrics()
        assert any("loss" in line for line in lines), "no step was logged"

    def test_an_exception_in_it_names_plugin_and_event(self) -> None:
        """an exception in one of its events names the callback and the event"""
        with tempfile.TemporaryDirectory() as folder:
            factory, callback = self.built(folder)

        def fail(*args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError("a defect")

        for event in EVENTS:
            setattr(callback, event, fail)
        watched(callback, factory)
        for event in EVENTS:
            try:
                getattr(callback, event)()
            except ProviderFailed as error:
                assert factory.name in str(error), f"{error} does not name {factory.name}"
                assert event in str(error), f"{error} does not name {event}"
                assert "a defect" in str(error), f"{error} hides the reason"
            else:
                raise AssertionError(f"an exception in {event} is swallowed")
