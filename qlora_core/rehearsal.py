"""A dry run: the whole road of a run on a tiny random model and the first rows of the data, in a temporary folder.

The road is `pipeline.execute` itself, then the same resumed, then generation. Not here: how the tiny model is made.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.config import ModelConfig, RunConfig
from qlora_core.errors import DataError, QLoRAError, RunError
from qlora_core.kernels import apply_kernels
from qlora_core.libraries import import_libraries
from qlora_core.parts import Parts, Weighted
from qlora_core.pipeline import Interrupted, execute
from qlora_core.providers import DatasetSource
from qlora_core.resume import check_same_run, checkpoint_to_resume
from qlora_core.run import Run
from qlora_core.stages import Stage, Stages, announced, watch

if TYPE_CHECKING:
    import datasets

__all__ = ["first_rows", "rehearse"]

STEPS, SAVED = 4, 2  # steps, and after how many of them a checkpoint is written that is then resumed from
TOKENS = 8192  # per step at most, if a single block is not longer
ROWS, FEW = 256, 16  # rows of a source that are read at most, and at least where they are long
BLOCKS = {"train": 32, "eval": 8}  # that the rows which are read fill, about
CHARACTERS = 4  # per token, about


def rehearse(
    config: RunConfig,
    parts: Parts,
    *,
    overwrite: bool = False,
    resume: bool | str | Path = False,
    quiet: bool = False,
    tell: Callable[[Stage], object] = lambda stage: None,
) -> list[Stage]:
    """Go through every stage of the run *config* in little, and return them; raise what the run would raise.

    *overwrite* and *resume* say how the output folder is checked. It is not touched: all is written to a temporary folder.
    *tell* is given each stage as soon as it is over, also the one that failed.
    """
    stages = Stages(tell)
    with tempfile.TemporaryDirectory(prefix="qlora-dry-run-", ignore_cleanup_errors=True) as name, _once_each():
        folder = Path(name)
        try:
            stages.begin("check")
            _check(config, parts, overwrite=overwrite, resume=resume)
            stages.begin("model")
            model = _miniature(config.model, parts, folder / "model")
            with contextlib.nullcontext() if config.data.streaming else _datasets_cached_in(str(folder / "cache")):
                _go(_shortened(config, model, folder / "run"), parts, stages, quiet=quiet)
        except BaseException as error:
            stages.end(failed=True)
            if isinstance(error, Interrupted):
                error.args = ("stopped; nothing is left of the dry run",)
            elif isinstance(error, QLoRAError):
                error.args = (str(error).replace(str(folder / "model"), config.model.path), *error.args[1:])
            raise
    stages.end()
    return stages.done


def _check(config: RunConfig, parts: Parts, *, overwrite: bool, resume: bool | str | Path) -> None:
    """Raise what `execute` raises for the real configuration and output folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("--dry-run takes one process; start it without torchrun")
    parts.check(config)
    run = Run(Path(config.output), config)
    run.check_folder(overwrite=overwrite, resume=bool(resume))
    if checkpoint_to_resume(run, resume) is not None:
        check_same_run(run)
    import_libraries()
    parts.check_libraries()


def _miniature(config: ModelConfig, parts: Parts, folder: Path) -> ModelConfig:
    """Refuse a real model that does not fit, by its shapes, and return a tiny one like it."""
    from qlora_core.miniature import write_miniature
    from qlora_core.model import build_skeleton, load_tokenizer

    tokenizer, skeleton = load_tokenizer(config), build_skeleton(config)
    parts.check_model(skeleton)
    return write_miniature(config, parts, skeleton, tokenizer, folder)


def _go(config: RunConfig, parts: Parts, stages: Stages, *, quiet: bool) -> None:
    """Run *config*, run it again from its checkpoint, and generate from what was saved."""
    from qlora_core.generation import generate
    from qlora_core.saved import SavedRun

    sources = (Weighted(first_rows(source, config.data.sequence_length), weight) for source, weight in parts.datasets)
    limited = replace(parts, datasets=tuple(sources))
    stages.begin("encode")
    execute(config, announced(limited, stages), plain_callbacks=[watch(stages)], quiet=quiet)
    run = Run.open(config.output)
    if run.checkpoints():  # a callback may have stopped training before
        stages.begin("resume")
        middle = run.checkpoint(SAVED)
        execute(config, replace(limited, exporters=()), resume=str(middle) if middle.is_dir() else True, quiet=quiet)
    stages.begin("generate")
    saved = SavedRun(run, parts.quantizer, parts.adapter)
    model = saved.add_adapter(saved.load_base())
    apply_kernels(model, config, parts)
    generate(model, saved.load_tokenizer(), "The", max_new_tokens=4)


def _shortened(config: RunConfig, model: ModelConfig, output: Path) -> RunConfig:
    """Return *config* for *model* and *output*, with few and small steps; what is not about size stays."""
    data, training = config.data, config.training
    batch, accumulation = min(training.batch_size, 2), min(training.gradient_accumulation, 2)
    if batch * accumulation * data.sequence_length > TOKENS:
        accumulation = 1
    if batch * data.sequence_length > TOKENS:
        batch = 1
    steps = {"max_steps": STEPS, "save_steps": SAVED, "eval_steps": SAVED, "logging_steps": 1, "save_total_limit": None}
    sizes = {
        "batch_size": batch,
        "gradient_accumulation": accumulation,
        "eval_batch_size": min(batch, training.eval_batch_size or batch),
    }
    window = {"gate_rows": min(data.gate_rows, ROWS), "buffer": min(data.buffer, ROWS)} if data.streaming else {}
    return config.model_copy(
        update={
            "model": model,
            "output": str(output),
            "training": training.model_copy(update=steps | sizes),
            "data": data.model_copy(update=window),
        }
    )


# What is read of the data


def first_rows(source: DatasetSource, length: int) -> DatasetSource:
    """Return a copy of *source* that gives its first examples only, enough for some blocks of *length* tokens.

    Of the training split no more is read than that, if the source has a `stream` of its own.
    """
    import datasets

    few = copy.copy(source)
    cache = datasets.config.HF_DATASETS_CACHE

    def examples(split: Any) -> datasets.Dataset | None:
        characters = BLOCKS[split] * length * CHARACTERS
        with _datasets_cached_in(cache):  # what the source keeps there the run finds again
            if split == "train" and type(source).stream is not DatasetSource.stream:
                with contextlib.suppress(DataError):  # of which `examples` has the last word: it may know a cached copy
                    if rows := _taken((row for row, _ in source.stream()), characters):
                        return _in_memory(rows)
            found = source.examples(split)
            if not isinstance(found, datasets.Dataset) or not len(found):
                return found
            rows = _taken(found, characters)
            return _in_memory(rows) if "text" in rows[0] else found.select(range(len(rows)))

    few.examples = examples  # type: ignore[method-assign]
    return few


def _taken(rows: Iterable[Any], characters: int) -> list[dict[str, Any]]:
    """Return the first of *rows*, of about so many *characters*; a text may be cut."""
    taken: list[dict[str, Any]] = []
    for row in itertools.islice(rows, ROWS):
        text = row.get("text")
        taken.append({**row, "text": text[:characters]} if isinstance(text, str) else dict(row))
        characters -= len(text) if isinstance(text, str) else len(repr(row))
        if characters <= 0 and (isinstance(text, str) or len(taken) >= FEW):
            break
    return taken


def _in_memory(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Return *rows* as a data set that gives them back as they are: what is no text, flag or list of numbers, as JSON."""
    import datasets
    import pyarrow as pa

    class Exact(datasets.Json):  # type: ignore[misc]
        def decode_example(self, text: str | None, token_per_repo_id: Any = None) -> Any:
            return None if text is None else json.loads(text)

    features, columns = datasets.Features(), {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds <= {str} or kinds == {bool}:
            features[name] = datasets.Value("bool" if bool in kinds else "string")
        elif kinds == {list} and all(type(number) is int for value in values for number in value or ()):
            features[name] = datasets.List(datasets.Value("int64"))
        else:
            features[name] = Exact()
            values = [None if value is None else json.dumps(value, default=str) for value in values]
        columns[name] = pa.array(values)
    table = pa.table({name: column.cast(features.arrow_schema.field(name).type) for name, column in columns.items()})
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))


@contextlib.contextmanager
def _datasets_cached_in(folder: str) -> Iterator[None]:
    """Let prepared data be kept in *folder*: what the first rows give is of no use to anybody later."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


# What is said


@contextlib.contextmanager
def _once_each() -> Iterator[None]:
    """Let each warning pass once, without those about the size of the model; the rest only where one asked for more."""
    logger = logging.getLogger("qlora_core")
    seen: set[str] = set()

    def passes(record: logging.LogRecord) -> bool:
        if logger.isEnabledFor(logging.DEBUG):
            return True
        message = record.getMessage()
        new = record.levelno > logging.INFO and record.funcName != "report_model" and message not in seen
        seen.add(message)
        return new

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
