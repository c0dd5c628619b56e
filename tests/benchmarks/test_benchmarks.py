"""The parts of the benchmarks that compute something, on readings made up here; `make bench` runs the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules beside this file, forgotten again afterwards: their names are theirs only there."""
    names = [
        "machine",
        "picture",
        "process",
        "scale",
        "settings",
        "verdict",
        "workload",
        "compare",
        "curves",
        "growth",
        "kept",
        "ladder",
    ]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield SimpleNamespace(**{name: __import__(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def run(rate: float, peak: float) -> dict[str, float]:
    return {"rate": rate, "peak": peak, "resident": 2 * peak}


def test_peak_is_that_of_a_child_and_its_own_child_together(bench: Any) -> None:
    hold = "import time; block = bytearray(50_000_000); time.sleep({})"
    child = (
        f"import subprocess, sys; {hold.format(0)}; subprocess.run([sys.executable, '-c', '{hold.format(0.4)}']); print('{{}}')"
    )
    reading = bench.process.run([sys.executable, "-c", child])
    assert 100e6 < reading.peak() < 150e6
    assert 50e6 < reading.resident < 100e6, "the larger of the two, not their sum"
    middle = reading.series[len(reading.series) // 2][0]
    assert max(reading.peak(0, middle), reading.peak(middle)) == reading.peak()


def test_what_a_child_computes_itself_is_not_taken_for_a_disturbance(bench: Any) -> None:
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint({})"
    before = bench.process.busy()
    reading = bench.process.run([sys.executable, "-c", spin])
    taken = bench.process.busy() - before
    assert taken >= 0.4
    assert reading.others * reading.seconds <= taken - 0.4, "the child's own half second is not among it"


def test_a_child_that_fails_says_so_with_its_last_words(bench: Any) -> None:
    with pytest.raises(bench.process.ChildError, match="no such luck"):
        bench.process.run([sys.executable, "-c", "raise SystemExit('no such luck')"])


def test_speed_is_the_median_of_the_steps_after_the_second(bench: Any) -> None:
    begins, ends = [0.0, 20.0, 30.0, 40.0, 50.0], [15.0, 28.0, 35.0, 44.0, 60.0]
    report = {"begins": begins, "ends": ends, "positions": [100] * 5, "supervised": [10, 10, 20, 40, 10]}
    assert bench.verdict.speeds(report, ragged=False) == {"rate": 20.0, "interval_rate": pytest.approx(100 / 9)}
    ragged = bench.verdict.speeds(report, ragged=True)
    assert ragged["rate"] == pytest.approx(70 / (5 + 4 + 10))
    assert ragged["interval_rate"] == pytest.approx(70 / (60 - 28))


def test_the_best_peer_is_the_faster_one_for_speed_and_the_smaller_one_for_memory(bench: Any) -> None:
    setting = bench.settings.named("seq512")[0]
    readings = {
        "trainer": [run(200, 3e9), run(220, 3e9), run(100, 9e9)],
        "trl": [run(150, 2e9), run(160, 2e9), run(170, 2e9)],
        "ours": [run(610, 1.0e9), run(590, 1.1e9), run(700, 0.9e9)],
    }
    speed, share, memory, resident = bench.verdict.lines(setting, readings, bound=1000)
    assert (speed.best, speed.ratio, speed.met) == ("trainer", pytest.approx(3.05), True)
    assert speed.spread == (pytest.approx(590 / 220), pytest.approx(7.0))
    assert (share.ratio, share.met) == (pytest.approx(0.61), True)
    assert (memory.best, memory.ratio, memory.met) == ("trl", pytest.approx(0.5), True)
    assert (resident.target, resident.met) == (None, None)


def test_a_line_without_peers_has_values_and_no_verdict(bench: Any) -> None:
    line = bench.verdict.lines(bench.settings.named("generate")[0], {"ours": [run(7, 1e9)]})[0]
    assert (line.values, line.ratio, line.met) == ({"ours": 7}, None, None)


def test_added_rounds_stand_after_those_before(bench: Any) -> None:
    before = {"readings": {"trainer": [1], "trl": [2], "ours": [3]}, "matmul": [10]}
    now = {"setting": {}, "readings": {"trainer": [4], "trl": [], "ours": [5]}, "matmul": [20]}
    both = bench.compare.added(before, now)
    assert both["readings"] == {"trainer": [1, 4], "trl": [2], "ours": [3, 5]}
    assert both["matmul"] == [10, 20]


def test_an_unknown_setting_is_answered_with_those_that_exist(bench: Any) -> None:
    with pytest.raises(ValueError, match="'seq511'; known: seq512, seq512-ckpt"):
        bench.settings.named("seq512,seq511")


def test_a_chat_supervises_what_the_assistant_says_and_nothing_else(bench: Any) -> None:
    class Letters:
        def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool = False) -> str:
            return "".join(f"<{m['role'][0]}>{m['content']};" for m in messages) + "<a>" * add_generation_prompt

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = bench.workload.chat(Letters(), [{"role": role, "content": content} for role, content in turns], seq=100)
    assert "".join(map(chr, row["input_ids"])) == "<u>one;<a>two;<u>three;<a>four;"
    assert "".join(chr(label) if label >= 0 else "." for label in row["labels"]) == "..........two;............four;"


def test_each_rung_keeps_what_those_below_it_set(bench: Any) -> None:
    rungs = tuple(bench.ladder.Rung(label, (f"kernels.{label}=true",)) for label in ("linear", "norm"))
    assert [sets for _, sets in bench.ladder.climb(rungs)] == [
        ("kernels.linear=true",),
        ("kernels.linear=true", "kernels.norm=true"),
    ]


def test_growth_is_the_bytes_of_each_further_token(bench: Any) -> None:
    assert bench.growth.slopes({1000: 5e6, 2000: 7e6, 4000: 11e6}) == [2000, 2000]


def test_the_large_model_has_at_least_the_parameters_asked_for_and_the_proportions_of_llama(bench: Any) -> None:
    sizes = bench.scale.shape(7e9)
    assert (sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]) == (4096, 11008, 32)
    assert 7e9 <= bench.scale.count(sizes) < 7.2e9


def test_names_of_curves_that_end_in_one_point_do_not_cover_each_other(bench: Any) -> None:
    chart = bench.picture.lines("", "step", "loss", {"one": [(1, 2.0)], "two": [(1, 2.0)], "three": [(1, 1.0)]})
    levels = {text.text: float(text.get("y")) for text in ElementTree.fromstring(chart).iter() if text.get("style")}
    assert levels["two"] == levels["one"] + 16
    assert levels["three"] > levels["two"] + 16


def test_a_reading_is_in_the_file_at_once_and_kept_only_where_that_is_wanted(bench: Any, tmp_path: Path) -> None:
    file = tmp_path / "new" / "readings.json"
    first = bench.kept.Kept(file, "work", resume=True)
    assert first.reading("one", lambda: 1) == 1
    assert first.reading("one", lambda: 2) == 1
    assert bench.kept.Kept(file, "work", resume=True).reading("one", lambda: 3) == 1
    assert bench.kept.Kept(file, "other work", resume=True).reading("one", lambda: 4) == 4
    assert bench.kept.Kept(file, "other work", resume=False).reading("one", lambda: 5) == 5


def test_curves_are_apart_by_the_root_of_the_mean_square(bench: Any) -> None:
    assert bench.curves.apart([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0
    assert bench.curves.apart([1.0, 2.0], [4.0, 6.0]) == pytest.approx((25 / 2) ** 0.5)
    assert bench.curves.smooth([1.0] * 10 + [3.0, 5.0]) == [(10, 1.0), (12, 4.0)]


def test_pictures_are_well_formed_and_end_on_round_numbers(bench: Any) -> None:
    assert bench.picture.ticks(8192, 8) == [0, 2000, 4000, 6000, 8000, 10000]
    chart = bench.picture.lines("a < b", "tokens", "GB", {"ours": [(1024, 1.0), (8192, 2.1)], "peer": [(1024, 3.0)]})
    bars = bench.picture.bars("ladder", ["one", "two"], {"tokens/s": [100, 300], "GB": [3.1, 1.2]})
    for picture in (chart, bars):
        assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert ">1.20<" in bars
