"""Dataset `text`: raw text from a file, a list, a glob or a folder. Light: imports no datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from qlora_core.config import RunConfig
from qlora_core.data.files import TEXTS, Paths, Unchanged, files_in
from qlora_core.hooks import hookimpl
from qlora_core.parts import Parts
from qlora_core.providers import DatasetSource, ProviderOptions

if TYPE_CHECKING:
    import datasets


class TextOptions(ProviderOptions):
    """What `text` accepts."""

    path: Paths = Field(
        description="a file, a glob such as corpus/*.txt, a folder (its .txt and .md files), or a list of these; "
        ".gz and .zst files are decompressed while they are read"
    )
    eval_path: Paths | None = Field(
        None, description="the same for evaluation; by default data.eval_fraction of the training text is held out"
    )
    encoding: str = Field("utf-8", description="of the files; a byte-order mark is dropped")
    separator: str | None = Field(
        None,
        min_length=1,
        description='text between two documents, such as "\\n\\n"; by default each file is one document',
    )

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

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._unchanged = Unchanged()

    @classmethod
    def example(cls, folder: Path) -> dict[str, Any]:
        """Return the path of a written file of 400 lines."""
        path = folder / "lines.txt"
        path.write_text("\n".join(f"Line {n} of a text, which has more words than one." for n in range(400)), encoding="utf-8")
        return {"path": str(path)}

    def check(self, config: RunConfig, parts: Parts) -> None:
        """Refuse paths that match no file."""
        for option in ("path", "eval_path"):
            self._files(option)

    def examples(self, split: Literal["train", "eval"]) -> datasets.Dataset | None:
        """Return rows of `text`, `continues` and `origin`, pieces of the documents in order; None without an eval_path."""
        from qlora_text.reading import read_documents

        files = self._files("path" if split == "train" else "eval_path")
        return read_documents(files, self.options.encoding, self.options.separator) if files else None

    def stream(self, position: Any = None) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the same rows without storing them; a position says the file and the place in it."""
        from qlora_text.reading import stream_documents

        files = self._files("path")
        return self._unchanged.rows(files, stream_documents(files, self.options.encoding, self.options.separator, position))

    def _files(self, option: str) -> list[Path]:
        value = getattr(self.options, option)
        return files_in(option, value, TEXTS) if value is not None else []


@hookimpl
def qlora_datasets() -> list[type[DatasetSource]]:
    """Provide `text`."""
    return [TextFile]
