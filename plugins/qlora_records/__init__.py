"""Dataset `records`: texts, prompts, chats or token ids in rows of files or of a hub dataset. Light: imports no datasets."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from qlora_core.config import RunConfig
from qlora_core.data.files import ROWS, TEXTS, AnyPaths, Unchanged, absolute, files_in, is_hub_name, plain_suffix
from qlora_core.errors import ConfigError, Problem
from qlora_core.hooks import hookimpl
from qlora_core.parts import Parts
from qlora_core.providers import DatasetSource, ProviderOptions
from qlora_core.validation import did_you_mean

if TYPE_CHECKING:
    import datasets

    from qlora_records.rows import Files, Hub

logger = logging.getLogger("qlora_core")

PACKED = (".parquet", ".arrow")  # compressed inside
LINES = tuple(suffix for suffix in ROWS if suffix not in PACKED)  # these may be compressed, too
DESCRIPTIONS = ("dataset_info.json", "dataset_dict.json", "state.json")  # that `save_to_disk` puts beside the data

FORMATS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "instruction": ("prompt", "completion", "input", "system"),
    "chat": ("messages", "tools", "prompt", "completion", "system", "roles"),
    "tokenized": (),
}
"""The fields that each format can use."""

COLUMNS = ("text", "prompt", "completion", "input", "system", "messages", "tools")
"""The options that name a column."""


def _located(path: Any) -> Any:
    return path if is_hub_name(path) else absolute(path)


FilesOrHub = Annotated[AnyPaths, AfterValidator(_located)]
Role = Literal["system", "user", "assistant", "tool"]


class RecordsOptions(ProviderOptions):
    """What `records` accepts."""

    path: FilesOrHub = Field(
        description="a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow; the first five also .gz or .zst), a glob, "
        "a folder, a list of these, or the name of a dataset on the hub, such as openai/gsm8k"
    )
    eval_path: FilesOrHub | None = Field(
        None, description="the same for evaluation; by default data.eval_fraction of the training rows is held out"
    )
    subset: str | None = Field(None, min_length=1, description="of a hub dataset that has several (config_name)")
    split: str = Field("train", min_length=1, description="of a hub dataset: the split to train on")
    eval_split: str | None = Field(None, min_length=1, description="of a hub dataset: the split to evaluate on")
    revision: str | None = Field(None, min_length=1, description="of a hub dataset: the branch, tag or commit to read")
    format: Literal["auto", "text", "instruction", "chat", "tokenized"] = Field(
        "auto", description="what a row is; auto: what the columns of the first row say"
    )
    text: str | None = Field(
        None,
        description="column with a text to train on; this and the other columns may be paths into nested data: a.b, or "
        "a[].b for one row per item of the list a",
    )
    prompt: str | None = Field(None, description="column with what is asked; not supervised")
    completion: str | None = Field(None, description="column with the answer, which is supervised")
    input: str | None = Field(
        None, description="column with text that follows the prompt after a blank line, where it is not empty"
    )
    system: str | None = Field(None, description="column with the system turn")
    messages: str | None = Field(None, description="column with the turns of a chat, in OpenAI's or ShareGPT's form")
    tools: str | None = Field(None, description="column with the tools that a chat may call: a list, or one as JSON text")
    roles: dict[str, Role] = Field(
        default_factory=dict,
        description="the data's names of roles and what they mean (system, user, assistant or tool), beside the usual ones",
    )

    @field_validator("subset", "split", "eval_split", "revision")
    @classmethod
    def _only_for_the_hub(cls, value: Any, info: ValidationInfo) -> Any:
        paths = [info.data[name] for name in ("path", "eval_path") if info.data.get(name) is not None]
        if value in (None, "train") or not paths or any(is_hub_name(path) for path in paths):
            return value
        raise ValueError(f"only a dataset on the hub has one, and {paths[0]!r} names files; leave {info.field_name} out")

    @field_validator(*COLUMNS, "roles")
    @classmethod
    def _used_by_the_format(cls, value: Any, info: ValidationInfo) -> Any:
        chosen, field = info.data.get("format", "auto"), str(info.field_name)
        if not value or chosen == "auto" or field in FORMATS[chosen]:
            return value
        uses = ", ".join(FORMATS[chosen]) or "no column names; it reads input_ids and labels"
        suits = " or ".join(name for name, fields in FORMATS.items() if field in fields)
        raise ValueError(f"the format {chosen} does not use it; it uses {uses}; leave it out, or set format to {suits}")

    @field_validator(*COLUMNS)
    @classmethod
    def _is_a_path(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if not value.strip():
            raise ValueError("the name of the column is empty")
        named = [value, *(info.data.get(name) or "" for name in COLUMNS)]
        lists = {path.partition("[]")[0] for path in named if "[]" in path}
        if value.count("[]") > 1 or ("[]" in value and not re.fullmatch(r"[^\[\]]+\[\](\.[^\[\]]+)?", value)):
            raise ValueError(f"{value!r} is no path into a row; write a.b, or a[].b for one row per item of the list a")
        if "[]" in value and len(lists) > 1:
            raise ValueError(f"the columns walk through several lists ({', '.join(sorted(lists))}); they can share one only")
        return value

    @field_validator(*COLUMNS)
    @classmethod
    def _fits_the_others(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Refuse names that no one format uses together."""
        field = str(info.field_name)
        named = {name for name in COLUMNS if info.data.get(name)} | {field}
        if value and not any(named <= set(fields) for fields in FORMATS.values()):
            forms = "; ".join(f"{name} uses {', '.join(fields)}" for name, fields in FORMATS.items() if fields)
            others = ", ".join(sorted(named - {field}))
            raise ValueError(f"no one format uses it together with {others}: {forms}")
        if value and field == "messages" and named & {"prompt", "completion"}:
            raise ValueError("a chat comes from messages, or from prompt and completion; name either")
        return value


class Records(DatasetSource):
    """Rows of JSON, CSV, Parquet or Arrow files, or of a hub dataset; files larger than memory work."""

    name = "records"
    Options = RecordsOptions
    options: RecordsOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._said: set[str] = set()
        self._unchanged = Unchanged()

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        """Return the path of a written file of 200 prompts with their completions."""
        path = folder / "sums.jsonl"
        rows = [{"prompt": f"What is {n} and {n + 1}?", "completion": f"It is {2 * n + 1}."} for n in range(200)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {"path": str(path)}

    def check(self, config: RunConfig, parts: Parts) -> None:
        """Refuse paths that match no file, and files of a kind that is not read."""
        for split in ("train", "eval"):
            self._source(split)

    def examples(self, split: Literal["train", "eval"]) -> datasets.Dataset | None:
        """Return rows of one form, with their `origin`; None where there is neither an eval_path nor an eval_split."""
        from qlora_records.reading import read_records

        source = self._source(split)
        return read_records(source, self.options.model_dump(), self._say) if source is not None else None

    def stream(self, position: Any = None) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the rows without storing them; a position says the file, and where in it the next row begins."""
        from qlora_records.reading import stream_records
        from qlora_records.rows import Files

        source = self._source("train")
        assert source is not None
        rows = stream_records(source, self.options.model_dump(), self._say, position)
        return self._unchanged.rows(source.paths, rows) if isinstance(source, Files) else rows

    def _say(self, line: str) -> None:
        """Log *line* once: a stream is opened again for every pass."""
        if line not in self._said and logger.isEnabledFor(logging.INFO):
            self._said.add(line)
            logger.info("%s", line)

    def _source(self, split: str) -> Files | Hub | None:
        """Return where the rows of *split* are, or None; raise ConfigError for paths that can't be read."""
        from qlora_records.rows import Files, Hub

        options = self.options
        option = "path" if split == "train" or options.eval_path is None else "eval_path"
        path = options.path if option == "path" else options.eval_path
        if split == "eval" and option == "path" and options.eval_split is None:
            return None
        if isinstance(path, str) and is_hub_name(path):
            revision = options.revision if path == options.path else None
            wanted = options.split if split == "train" else options.eval_split or options.split
            return Hub(path, options.subset, wanted, revision)
        assert path is not None
        files = files_in(option, path, ROWS, DESCRIPTIONS)
        for file in files:
            self._known(option, file)
        return Files(tuple(str(file) for file in files))

    @staticmethod
    def _known(option: str, file: Path) -> None:
        suffix, kinds = plain_suffix(file), ", ".join(ROWS)
        if suffix not in ROWS:
            what = f"{str(file)!r} has {f'the suffix {suffix!r}' if suffix else 'no suffix'}, which is not read; known: {kinds}"
            advice = "; raw text is read by the dataset 'text'" if suffix in TEXTS else did_you_mean(suffix, ROWS)
            raise ConfigError([Problem((option,), what + advice)])
        if suffix in PACKED and suffix != file.suffix.lower():
            what = f"{str(file)!r}: {suffix} files are compressed inside; decompress it ({', '.join(LINES)} may be compressed)"
            raise ConfigError([Problem((option,), what)])


@hookimpl
def qlora_datasets() -> list[type[DatasetSource]]:
    """Provide `records`."""
    return [Records]
