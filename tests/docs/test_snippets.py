"""Every snippet of README and docs is run: Python, YAML, TOML and `qlora` lines, page by page, in an empty directory.

How a page is read:
- a fenced block with `title="NAME"` is a file: it is written, and Python is imported from it;
- other `python` blocks of a page share their names, like the cells of a notebook;
- other `yaml` blocks are whole configurations, or parts of one that are completed with a model and a dataset;
- every line of a `bash` block is a command: `qlora ...` is run, those in NOT_RUN are too long or install something;
  a command that is refused says so, `# exits with 2`, and a `text` block after it shows the message, word for word
  but for the random name of a traceback's file.
A block is left out only by `<!-- not run: reason -->` right before it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import shlex
import signal
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?P<optout><!-- not run: [^>]+ -->\s*)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
NOT_RUN = ("make ", "pip install ", "python -m pip ", "qlora demo", "git clone ", "cd ", "torchrun ", "python examples/")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
UNCHECKED = {"", "text", "console", "json"}  # output, and JSON that is shown


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page."""

    language: str
    title: str
    code: str
    line: int
    opted_out: bool


def snippets(page: Path) -> Iterator[Snippet]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] if line.strip() else "\n" for line in match["code"].splitlines(keepends=True))
        title = re.search(r'title="([^"]+)"', match["info"])
        line = text[: match.start("language")].count("\n") + 1
        yield Snippet(match["language"], title[1] if title else "", code, line, bool(match["optout"]))


def stable(message: str) -> str:
    """Return *message* without the random part of a traceback's file."""
    return re.sub(r"/\S*/qlora-crash-\w+", "/tmp/qlora-crash-XXXX", message)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a page imported from its own files, and what a command did to logging and with --trace."""
    monkeypatch.setenv("QLORA_TRACE", "0")
    logger = logging.getLogger("qlora_core")
    before, path = set(sys.modules), list(sys.path)
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
    sys.path[:] = path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if not file.startswith((sys.prefix, sys.base_prefix, str(ROOT))):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_of_a_page_run(page: Path, workplace: Path, docs_model: Path, own_modules: None) -> None:
    sys.path.insert(0, str(workplace))
    names: dict[str, Any] = {"__name__": "snippet"}
    for snippet in snippets(page):
        if snippet.language == "text" and snippet.code.startswith("error: "):
            assert stable(snippet.code) == stable(names.pop("stderr")), f"{name_of(page)}:{snippet.line}"
        if snippet.opted_out or snippet.language in UNCHECKED:
            continue
        run = RUNNERS.get(snippet.language)
        where = f"{name_of(page)}:{snippet.line}"
        assert run is not None, f"{where}: no way to run a {snippet.language!r} block; mark it `<!-- not run: reason -->`"
        code = snippet.code.replace(HUB_ID, str(docs_model))
        if snippet.title:
            file = workplace / snippet.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(code, encoding="utf-8")
        run(snippet, code, names, where, docs_model)


def run_python(snippet: Snippet, code: str, names: dict[str, Any], where: str, model: Path) -> None:
    if snippet.title:
        importlib.invalidate_caches()
        importlib.import_module(snippet.title.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        return
    padded = "\n" * snippet.line + code  # so that a traceback shows the line of the page
    with warnings.catch_warnings():
        exec(compile(padded, where.partition(":")[0], "exec", dont_inherit=True), names)


def run_yaml(snippet: Snippet, code: str, names: dict[str, Any], where: str, model: Path) -> None:
    from qlora_core import Registry, RunConfig, resolve, yaml_file

    data, _ = yaml_file.parse(code, where)
    if "nav" in data or "site_name" in data:
        return
    data.setdefault("model", str(model))
    data.setdefault("dataset", {"name": "text", "path": "corpus.txt"})
    config = RunConfig.parse(data)
    resolved, parts = resolve(config, Registry(modules=config.plugins, disable=config.disable_plugins))
    parts.check(resolved)


def run_toml(snippet: Snippet, code: str, names: dict[str, Any], where: str, model: Path) -> None:
    for module in tomllib.loads(code).get("project", {}).get("entry-points", {}).get("qlora_core", {}).values():
        importlib.import_module(module)


def run_bash(snippet: Snippet, code: str, names: dict[str, Any], where: str, model: Path) -> None:
    from qlora_core.cli.main import main

    for line in code.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition("  #")
        if not command.strip() or command.lstrip().startswith("#") or command.startswith(NOT_RUN):
            continue
        words = shlex.split(command.partition(" > ")[0])
        assert words[0] == "qlora", f"{where}: {command!r} is not run; add it to NOT_RUN or leave it out"
        expected = re.search(r"exits with (\d+)", comment)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        stderr = io.StringIO()
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings(), contextlib.redirect_stderr(stderr):
            main(words[1:])
        names["stderr"] = stderr.getvalue()
        print(stderr.getvalue(), end="", file=sys.stderr)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        code_number = ended.value.code or 0
        assert code_number == (int(expected[1]) if expected else 0), f"{where}: {command!r} exited with {code_number}"


RUNNERS: dict[str, Callable[[Snippet, str, dict[str, Any], str, Path], None]] = {
    "python": run_python,
    "yaml": run_yaml,
    "toml": run_toml,
    "bash": run_bash,
}


def test_a_snippet_can_opt_out_only_with_a_reason() -> None:
    for page in PAGES:
        for comment in re.findall(r"<!-- not run.*?-->", page.read_text(encoding="utf-8")):
            assert re.fullmatch(r"<!-- not run: \S.{5,} -->", comment), f"{name_of(page)}: {comment}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{name_of(page)}: {target} does not exist"


def test_pages_have_snippets_that_run() -> None:
    run = [s for page in PAGES for s in snippets(page) if not s.opted_out and s.language in RUNNERS]
    assert len(run) > 40
