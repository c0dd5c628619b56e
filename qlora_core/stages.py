"""The stages of a run as a dry run tells them: which one it is in, seen from outside, and how long each took.

A run is one function, `pipeline.execute`, that knows nothing of this: copies of its parts say when they are first called.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_core.parts import Parts

if TYPE_CHECKING:
    import transformers

__all__ = ["Stage", "Stages", "announced", "watch"]

TURNS = ("step", "evaluate", "checkpoint")  # stages that take turns


@dataclass(frozen=True)
class Stage:
    """A part of the road, and how long it took."""

    name: str
    seconds: float
    failed: bool = False


class Stages:
    """Which stage the rehearsal is in; each is told once it is over."""

    def __init__(self, tell: Callable[[Stage], object]) -> None:
        self.done: list[Stage] = []
        self._tell = tell
        self._open: dict[str, float] = {}  # seconds so far
        self._current = ""
        self._since = time.perf_counter()

    def begin(self, name: str) -> None:
        """Go on to the stage *name*, or back to it where stages take turns."""
        if name == self._current:
            return
        self._pause()
        for known in [known for known in self._open if name not in TURNS or known not in TURNS]:
            self._close(known)
        self._current = name
        self._open.setdefault(name, 0.0)

    def end(self, *, failed: bool = False) -> None:
        """Tell all that is open, the stage that has *failed* last."""
        self._pause()
        for known in sorted(self._open, key=lambda known: known == self._current):
            self._close(known, failed=failed and known == self._current)

    def _pause(self) -> None:
        now = time.perf_counter()
        if self._current:
            self._open[self._current] += now - self._since
        self._since = now

    def _close(self, name: str, *, failed: bool = False) -> None:
        stage = Stage(name, self._open.pop(name), failed)
        self.done.append(stage)
        self._tell(stage)


def announced(parts: Parts, stages: Stages) -> Parts:
    """Return *parts* that say which stage begins when they are first called."""
    return replace(
        parts,
        quantizer=_announcing(parts.quantizer, "load_kwargs", "load and quantise", stages),
        adapter=_announcing(parts.adapter, "inject", "inject", stages, then="step"),
        exporters=tuple(_announcing(exporter, "export", f"export {exporter.name}", stages) for exporter in parts.exporters),
    )


def _announcing(provider: Any, method: str, stage: str, stages: Stages, then: str = "") -> Any:
    """Return a copy of *provider* whose *method* begins *stage* when it is called for the first time, and *then* after it."""
    announcing = copy.copy(provider)
    original = getattr(announcing, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        delattr(announcing, method)
        stages.begin(stage)
        answer = original(*args, **kwargs)
        if then:
            stages.begin(then)
        return answer

    setattr(announcing, method, call)
    return announcing


def watch(stages: Stages) -> transformers.TrainerCallback:
    """Return a callback that says which stage of training begins."""
    import transformers

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stages.begin("evaluate" if args.eval_on_start else "step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if control.should_evaluate:
                stages.begin("evaluate")
            else:
                self.on_evaluate(args, state, control)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if control.should_save:
                stages.begin("checkpoint")
            else:
                self.on_save(args, state, control)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            over = control.should_training_stop or state.global_step >= state.max_steps
            stages.begin("save" if over else "step")

    return Watch()
