"""The errors a user can mend. Each message says what is wrong, where, and the remedy. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["ConfigError", "DataError", "ModelError", "PluginError", "Problem", "QLoRAError", "RunError"]

Path = tuple[str | int, ...]


class QLoRAError(Exception):
    """Base of every error that the user can mend; the command line prints it and exits with 2."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration: *where* is the path of the key, *what* says what and the remedy."""

    where: Path
    what: str
    source: str = ""  # "run.yaml:7", where the key was written, if it is known

    def __str__(self) -> str:
        key = ""
        for part in self.where:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
        return ": ".join(part for part in (self.source, key, self.what) if part)


class ConfigError(QLoRAError, ValueError):
    """A configuration that does not validate. `problems` lists everything that is wrong, not only the first."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem((), problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def under(self, *where: str | int) -> ConfigError:
        """Return the same error with every location re-prefixed by *where*."""
        return ConfigError(replace(p, where=(*where, *p.where)) for p in self.problems)

    def located(self, name: str, lines: Mapping[Path, int], overrides: Sequence[str] = ()) -> ConfigError:
        """Return the same error with `name:line` before each problem whose key stands in *lines*.

        A problem at or below the key of one of *overrides* (`key.path=value`) gets that override instead.
        """
        keys = {tuple(override.partition("=")[0].strip().split(".")): f"--set {override}" for override in overrides}
        located = []
        for problem in self.problems:
            path = tuple(str(part) for part in problem.where)
            source = next((text for key, text in keys.items() if path[: len(key)] == key), "")
            at = problem.where
            while at and at not in lines:  # a missing key is reported at its parent
                at = at[:-1]
            located.append(replace(problem, source=source or (f"{name}:{lines[at]}" if at in lines else "")))
        return ConfigError(located)


class PluginError(QLoRAError):
    """A plugin or provider that can't be found, chosen or loaded."""


class DataError(QLoRAError):
    """Data that can't be read, or that gives nothing to train on."""


class ModelError(QLoRAError):
    """A model that can't be loaded, or that does not fit the chosen providers."""


class RunError(QLoRAError):
    """An output folder, checkpoint or disk that can't be used as asked."""
