"""The live display: a bar on a terminal, above which lines can be printed; silence when quiet."""

from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console

from qlora_console.progress import ProgressDisplay

LOGS = {"loss": 2.5, "tokens_per_second": 1234.5, "peak_memory_bytes": 1_500_000_000}


def events(display: ProgressDisplay) -> None:
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)
    display.on_train_begin(None, state, None)
    for step in range(1, 5):
        state.global_step = step
        display.on_step_end(None, state, None)
        display.on_log(None, state, None, logs=LOGS)
    display.on_log(None, state, None, logs={"eval_loss": 2.0, "perplexity": 7.389})
    display.on_train_end(None, state, None)


def test_a_terminal_gets_a_bar_with_figures_and_time_left() -> None:
    screen = io.StringIO()
    events(ProgressDisplay(console=Console(file=screen, force_terminal=True, width=140)))
    shown = screen.getvalue()
    assert "4/4" in shown
    assert "loss 2.500 · 1,234 tokens/s · peak 1.50 GB" in shown
    assert "left" in shown
    assert "perplexity 7.389" in shown


def test_eighty_columns_show_the_time_left_and_all_figures() -> None:
    screen = io.StringIO()
    events(ProgressDisplay(console=Console(file=screen, force_terminal=True, color_system=None, width=80)))
    shown = " ".join(screen.getvalue().split())
    assert "4/4 00:00 left loss 2.500 · 1,234 tokens/s · peak 1.50 GB" in shown


def test_elsewhere_each_log_is_one_plain_line() -> None:
    screen = io.StringIO()
    events(ProgressDisplay(console=Console(file=screen, width=140)))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "step 1/4 · loss 2.500 · 1,234 tokens/s · peak 1.50 GB"
    assert lines[4] == "step 4/4 · eval loss 2.0000 · perplexity 7.389"


def test_quiet_says_nothing() -> None:
    screen = io.StringIO()
    events(ProgressDisplay(quiet=True, console=Console(file=screen, force_terminal=True)))
    assert screen.getvalue() == ""
