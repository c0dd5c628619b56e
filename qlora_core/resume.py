"""From which checkpoint a run goes on, and whether a configuration asks for the same run. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_core.config import RunConfig
from qlora_core.errors import RunError
from qlora_core.run import Run
from qlora_core.seal import fault

__all__ = ["check_made_of", "check_same_run", "checkpoint_to_resume"]

logger = logging.getLogger("qlora_core")

FREE = {
    "": ("kernels", "callbacks", "exports", "output", "plugins", "disable_plugins"),
    "model.": ("cache",),  # the same bits, with and without
    "data.": ("on_problem",),  # a stream may have stopped at a row that is wrong
    "training.": ("epochs", "max_steps", "keep", "save_steps", "save_total_limit", "logging_steps", "gradient_checkpointing"),
    "training.eval_": ("batch_size", "steps", "at_start"),
    "training.extra.": ("dataloader_num_workers", "dataloader_pin_memory", "logging_first_step"),
}
"""What may differ from the configuration that a run began with: how long, how often, and what leaves its bits alone."""
SHOWN = 8  # differences in a message
ABSENT = object()


def checkpoint_to_resume(run: Run, resume: bool | str | Path) -> Path | None:
    """Return the checkpoint that *resume* names, or the newest good one for True; None for False.

    One that is damaged is named in a warning and passed over. Raises RunError where there is no good one.
    """
    if not resume:
        return None
    known = run.checkpoints()
    if resume is True:
        if not known:
            raise RunError(f"output: {run.folder} has no checkpoint to resume from; start anew with --overwrite")
        damaged = []
        for path in reversed(known):
            if (what := fault(path)) is None:
                return path
            damaged.append(f"{path}: {what}")
            logger.warning("passing over a damaged checkpoint, %s", damaged[-1])
        raise RunError(f"output: every checkpoint is damaged ({'; '.join(damaged)}); start anew with --overwrite")
    path = Path(resume)
    path = path if path.is_dir() else run.folder / "checkpoints" / path.name
    others = ", ".join(checkpoint.name for checkpoint in known) or "none"
    if not path.is_dir():
        raise RunError(f"{resume} is no checkpoint; {run.folder} has {others}")
    if (what := fault(path)) is not None:
        raise RunError(f"{path}: no complete checkpoint, {what}; name another one, {run.folder} has {others}")
    return path


def check_same_run(run: Run) -> None:
    """Raise RunError, with each field that differs, where the configuration asks for another run than began in the folder."""
    if not (run.folder / "config.yaml").is_file():
        return
    stored, now = (
        _leaves(config.model_dump(mode="json")) for config in (RunConfig.read(run.folder / "config.yaml"), run.config)
    )
    differ = [
        (key, stored.get(key, ABSENT), now.get(key, ABSENT))
        for key in sorted({*stored, *now})
        if stored.get(key, ABSENT) != now.get(key, ABSENT) and not _free(key) and not (key not in stored and _provided(key))
    ]
    renamed = {key.removesuffix("name") for key, _, _ in differ if key.endswith(".name")}  # then all else differs, too
    differ = [one for one in differ if not any(one[0].startswith(part) and one[0] != f"{part}name" for part in renamed)]
    if differ:
        raise RunError(_message(run, differ))


def check_made_of(run: Run, record: Mapping[str, Any]) -> None:
    """Raise RunError where model or data are not those that the run began with, by their fingerprints.

    *record* is the provenance of now. Other packages or another device are told: the bits may differ.
    """
    before = run.record()
    for section, key, words in (
        ("model", "revision", "the model is another revision"),
        ("model", "fingerprint", "the files of the model are not those"),
        ("data", "fingerprint", "the data are not those"),
    ):
        was, is_ = (side.get(section, {}).get(key) for side in (before, record))
        if was is not None and is_ is not None and was != is_:
            raise RunError(
                f"{section}: {words} that the run in {run.folder} began with; bring those of then back to resume it, "
                "or start anew in another folder"
            )
    changed = [
        f"{name} (was {was or 'absent'}, is {is_ or 'absent'})" for name, was, is_ in _compared(before, record) if was != is_
    ]
    if changed:
        logger.warning("resuming on other software or another machine, which may change the bits: %s", ", ".join(changed))


def _compared(before: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    was, is_ = (side.get("packages", {}) for side in (before, record))
    for name in sorted({*was, *is_} if was else ()):
        yield name, was.get(name), is_.get(name)
    for name in ("device", "bf16"):
        yield name, *(side.get("platform", {}).get(name) for side in (before, record))


def _free(key: str) -> bool:
    free = [f"{section}{name}" for section, names in FREE.items() for name in names]
    return any(key == name or key.startswith(f"{name}.") for name in free)


def _provided(key: str) -> bool:
    """Return whether *key* is a provider's option: one that is new is one that an older version did not know."""
    return key.startswith(("quantizer.", "adapter.", "dataset."))


def _leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Return the values of nested *value* by their dotted places."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {where: value}
    inner = (_leaves(item, f"{where}.{key}" if where else str(key)) for key, item in items)
    return {place: leaf for leaves in inner for place, leaf in leaves.items()}


def _message(run: Run, differ: list[tuple[str, Any, Any]]) -> str:
    lines = [f"  {key}: was {_shown(was)}, is {_shown(is_)}" for key, was, is_ in differ[:SHOWN]]
    if len(differ) > SHOWN:
        lines.append(f"  and {len(differ) - SHOWN} more")
    began = f"output: the run in {run.folder} began with another configuration:"
    remedy = f"resume it with its own, qlora train {run.folder / 'config.yaml'} --resume, or start anew in another folder"
    return "\n".join([began, *lines, remedy])


def _shown(value: Any) -> str:
    return "not set" if value is ABSENT or value is None else repr(value)
