"""The errors that a user can mend: what a message is made of."""

from __future__ import annotations

import pytest

from qlora_core import errors
from qlora_core.errors import ConfigError, Problem, QLoRAError


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem((), "nothing to do"), "nothing to do"),
        (Problem(("adapter", "r"), "must be at least 1"), "adapter.r: must be at least 1"),
        (Problem(("callbacks", 1, "patience"), "required"), "callbacks[1].patience: required"),
        (Problem(("tokens", "add", 0), "must be text"), "tokens.add[0]: must be text"),
        (Problem(("adapter", "r"), "must be at least 1", "run.yaml:7"), "run.yaml:7: adapter.r: must be at least 1"),
        (Problem((), "is empty", "run.yaml:1"), "run.yaml:1: is empty"),
    ],
)
def test_a_problem_reads_source_then_key_then_what(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_a_configuration_error_lists_every_problem_on_a_line_of_its_own() -> None:
    error = ConfigError([Problem(("a",), "first"), Problem(("b", "c"), "second")])
    assert str(error) == "a: first\nb.c: second"
    assert [problem.where for problem in error.problems] == [("a",), ("b", "c")]


def test_a_configuration_error_made_from_text_has_one_problem_without_a_place() -> None:
    error = ConfigError("write key=value")
    assert str(error) == "write key=value"
    assert error.problems == [Problem((), "write key=value")]


def test_under_puts_a_prefix_before_every_place_and_leaves_the_original_alone() -> None:
    error = ConfigError([Problem(("r",), "too small"), Problem((), "refused")])
    assert str(error.under("callbacks", 2)) == "callbacks[2].r: too small\ncallbacks[2]: refused"
    assert str(error) == "r: too small\nrefused"


def test_located_names_the_line_of_the_key_or_of_the_nearest_section_that_was_written() -> None:
    error = ConfigError([Problem(("adapter", "r"), "too small"), Problem(("data", "x"), "unknown"), Problem(("z",), "odd")])
    located = error.located("run.yaml", {("adapter",): 3, ("adapter", "r"): 4, ("data",): 6})
    assert str(located) == "run.yaml:4: adapter.r: too small\nrun.yaml:6: data.x: unknown\nz: odd"


def test_every_error_is_a_qloraerror_so_that_one_except_clause_catches_what_a_user_can_mend() -> None:
    named = [getattr(errors, name) for name in errors.__all__ if name != "Problem"]
    assert all(issubclass(error, QLoRAError) for error in named)
    assert issubclass(ConfigError, ValueError)
