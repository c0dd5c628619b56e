"""Dataset `text`: raw text from a file, a list, a glob or a folder. Light: imports no datasets."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from qlora_core.config import RunConfig
from qlora_core.errors import ConfigError, Problem
from qlora_core.hooks import hookimpl
from qlora_core.parts import Parts
from qlora_core.providers import DatasetSource, ProviderOptions

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".txt", ".md")


class TextOptions(ProviderOptions):
    """What `text` accepts."""

    path: str | tuple[str, ...] = Field(
        description="a file, a glob such as corpus/*.txt, a folder (its .txt and .md files), or a list of these"
    )
    eval_path: str | tuple[str, ...] | None = Field(
        None, description="the same for evaluation; by default data.eval_fraction of the training text is held out"
    )
    encoding: str = Field("utf-8", description="of the files; a byte-order mark is dropped")
    separator: str | None = Field(
        None,
        min_length=1,
        description='text between two documents, such as "\\n\\n"; by default each file is one document',
    )

    @field_validator("path", "eval_path", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Take pathlib's paths, too."""
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        return [os.fspath(v) if isinstance(v, os.PathLike) else v for v in value] if isinstance(value, list) else value

    @field_validator("path", "eval_path")
    @classmethod
    def _absolute(cls, value: Any) -> Any:
        """Paths are relative to the working directory; the resolved configuration must not depend on it."""
        if value is None:
            return None
        if value == "":
            raise ValueError("the path is empty; name a file, a glob or a folder")
        if isinstance(value, str):
            return os.path.abspath(os.path.expanduser(value))
        if not value:
            raise ValueError("the list is empty; name at least one file")
        return tuple(os.path.abspath(os.path.expanduser(item)) for item in value)

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError:
            raise ValueError(f"unknown encoding {value!r}; utf-8 and latin-1 are usual") from None
        return value


class TextFile(DatasetSource):
    """Raw text. Documents end with the tokenizer's end-of-text token; files larger than memory work."""

    name = "text"
    Options = TextOptions
    options: TextOptions

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        """Return the path of a written file of 400 lines."""
        path = folder / "lines.txt"
        path.write_text("\n".join(f"Line {n} of a text, which has more words than one." for n in range(400)), encoding="utf-8")
        return {"path": str(path)}

    def check(self, config: RunConfig, parts: Parts) -> None:
        """Refuse paths that match no file."""
        for option in ("path", "eval_path"):
            value = getattr(self.options, option)
            if value is not None:
                self._files(option, value)

    def examples(self, split: Literal["train", "eval"]) -> datasets.Dataset | None:
        """Return rows of `text` and `continues`, pieces of the documents in order; None where there is no eval_path."""
        from qlora_text.reading import read_documents

        option = "path" if split == "train" else "eval_path"
        value = getattr(self.options, option)
        if value is None:
            return None
        return read_documents(self._files(option, value), self.options.encoding, self.options.separator)

    def _files(self, option: str, value: str | Sequence[str]) -> list[Path]:
        """Return the files that *value* names, each once, globs and folders sorted; raise ConfigError for one that has none."""
        found: dict[Path, None] = {}
        for item in [value] if isinstance(value, str) else value:
            path = Path(item)
            if path.is_dir():
                files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
                problem = f"the folder {item!r} holds no {' or '.join(SUFFIXES)} file; name the files, or a glob"
            elif path.is_file():
                files, problem = [path], ""
            else:
                files = sorted(Path(p) for p in glob.glob(item, recursive=True) if Path(p).is_file())
                problem = f"no file {item!r}; paths are relative to the working directory {os.getcwd()}"
            if not files:
                raise ConfigError([Problem((option,), problem)])
            found |= dict.fromkeys(files)
        return list(found)


@hookimpl
def qlora_datasets() -> list[type[DatasetSource]]:
    """Provide `text`."""
    return [TextFile]
