"""Broken plugins: each is named with its reason, and what does not use it goes on working."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEAD = "import qlora_core\n"
MARK = "@qlora_core.hookimpl\n"

# Fails while it is loaded or asked for its parts: the source, and the reason that is given.
UNUSABLE = {
    "import error": ("import a_library_nobody_has", "ModuleNotFoundError: No module named 'a_library_nobody_has'"),
    "wrong type returned": (
        HEAD + MARK + "def qlora_adapters(): return {}",
        "qlora_adapters: must return a list of Adapter classes",
    ),
    "misspelt hook": (
        HEAD + MARK + "def qlora_adaptors(): return []",
        "qlora_adaptors is no hook of this qlora-core (hook API 1); it has qlora_quantizers, ",
    ),
    "later hook api": (HEAD + "qlora_hook_api = 9\n" + MARK + "def qlora_adapters(): return []", "was built for hook API 9"),
    "argument of a later hook": (
        HEAD + MARK + "def qlora_adapters(stage): return []",
        "the argument 'stage' is unknown to hook API 1",
    ),
    "exception in a hook": (HEAD + MARK + "def qlora_adapters(): return 1 / 0", "qlora_adapters: ZeroDivisionError"),
    "unmarked hook": (HEAD + "def qlora_adapters(): return []\n" + MARK + "def qlora_callbacks(): return []", "is not marked"),
}

PARTS = """
    import qlora_core

    class Options(qlora_core.ProviderOptions):
        size: int = 1
        "how many"

    class Q(qlora_core.Quantizer):
        name = "broken_q"
        Options = Options
        def __init__(self, **options):
            super().__init__(**options)
            {init}
        def missing(self):
            {missing}
            return ""
        def check(self, config, parts):
            {check}
        def check_libraries(self):
            {check_libraries}
        def load_kwargs(self, skeleton):
            {load_kwargs}
            return {{}}
        def prepare(self, model):
            {prepare}
            return model
        def is_quantized(self, module): return False
        def dequantize(self, module): return module.weight
        def stored_bytes(self, shape): return 0

    class A(qlora_core.Adapter):
        name = "broken_a"
        def check_model(self, skeleton):
            {check_model}
        def inject(self, model, new_token_ids=()):
            import torch
            {inject}
            head = model.get_output_embeddings()
            scale = torch.nn.Parameter(torch.ones(()))
            head.register_parameter("gain", scale)
            head.register_forward_hook(lambda module, args, output: output * module.gain)
            return model
        def save(self, model, folder):
            {save}
        def load(self, model, folder): return model

    class D(qlora_core.DatasetSource):
        name = "broken_d"
        def examples(self, split):
            import datasets
            {examples}
            return None if split == "eval" else datasets.Dataset.from_dict({{"text": ["some words of text " * 50] * 4}})

    class K(qlora_core.Kernels):
        name = "broken_k"
        def suits(self, device):
            {suits}
            return 0
        def apply(self, model):
            {apply}
            return model

    class C(qlora_core.CallbackFactory):
        name = "broken_c"
        def training_arguments(self):
            {training_arguments}
            return {{}}
        def build(self, run):
            {build}
            import transformers
            class Callback(transformers.TrainerCallback):
                def on_log(self, args, state, control, **kwargs):
                    {on_log}
            return Callback()

    class E(qlora_core.Exporter):
        name = "broken_e"
        def export(self, saved, folder):
            {export}
            (folder / "x.txt").write_text("x")

    @qlora_core.hookimpl
    def qlora_quantizers(): return [Q]
    @qlora_core.hookimpl
    def qlora_adapters(): return [A]
    @qlora_core.hookimpl
    def qlora_datasets(): return [D]
    @qlora_core.hookimpl
    def qlora_kernels(): return [K]
    @qlora_core.hookimpl
    def qlora_callbacks(): return [C]
    @qlora_core.hookimpl
    def qlora_exporters(): return [E]
"""
PLACES = {
    "init": "quantizer 'broken_q'",
    "missing": "quantizer 'broken_q'",
    "check": "quantizer 'broken_q'",
    "check_libraries": "quantizer 'broken_q'",
    "load_kwargs": "quantizer 'broken_q'",
    "prepare": "quantizer 'broken_q'",
    "check_model": "adapter 'broken_a'",
    "inject": "adapter 'broken_a'",
    "save": "adapter 'broken_a'",
    "examples": "dataset 'broken_d'",
    "apply": "kernels 'broken_k'",
    "training_arguments": "callback 'broken_c'",
    "build": "callback 'broken_c'",
    "on_log": "callback 'broken_c'",
    "export": "exporter 'broken_e'",
}
ALL = {
    "quantizer": "broken_q",
    "adapter": "broken_a",
    "dataset": "broken_d",
    "kernels": "broken_k",
    "callbacks": ["broken_c"],
    "exports": ["broken_e"],
}


def source(place: str = "", statement: str = "raise ZeroDivisionError('no luck')") -> str:
    places = dict.fromkeys([*PLACES, "suits"], "pass")
    return PARTS.format(**{**places, **({place: statement} if place else {})})


def said(result: Any) -> list[str]:
    """Return the lines on standard error that are no warnings: the parts above adapt and quantise hardly anything."""
    return [line for line in result.err.splitlines() if not line.startswith("warning: ")]


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_plugin_is_listed_with_its_reason_and_the_rest_works(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str], write_config: Callable[..., Path], case: str
) -> None:
    text, reason = UNUSABLE[case]
    name = write_module(f"unusable_{case.replace(' ', '_')}", text)
    listed = json.loads(qlora("plugins", "list", "-p", name, "--json").out)["plugins"]
    (entry,) = [plugin for plugin in listed if plugin["name"] == name]
    assert entry["status"] == "failed"
    assert reason in entry["failure"]
    assert "failed" in qlora("plugins", "list", "-p", name).out
    doctor = qlora("doctor", "-p", name, "--json")
    assert doctor.code == 2
    assert any(problem.startswith(f"plugin {name}: ") and reason in problem for problem in json.loads(doctor.out)["problems"])
    for arguments in (["plugins", "show", "lora"], ["config", "schema"]):
        assert qlora(*arguments, "-p", name).code == 0
    asked = qlora("config", "show", write_config(adapter={"name": "theirs", "r": 2}), "--set", f"plugins=[{name}]")
    assert asked.code == 2
    assert reason in asked.err


def test_two_distributions_with_one_entry_point_name_leave_the_rest_alone(
    qlora: Callable[..., Any], here: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        folder = here / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[qlora_core]\nbell = bell_of_{name}\n")
    monkeypatch.syspath_prepend(str(here))
    plugins = {plugin["name"]: plugin for plugin in json.loads(qlora("plugins", "list", "--json").out)["plugins"]}
    assert plugins["bell"]["status"] == "failed"
    assert "two distributions use the entry-point name 'bell'" in plugins["bell"]["failure"]
    assert qlora("config", "show", write_config()).code == 0
    assert "two distributions" in qlora("doctor").out


def test_a_run_with_every_part_from_one_module_works(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str], write_config: Callable[..., Path], here: Path
) -> None:
    name = write_module("whole_of_parts", source())
    result = qlora("train", write_config(**ALL), "-p", name, "-q")
    assert (result.code, said(result)) == (0, [])
    record = json.loads((here / "out" / "provenance.json").read_text())["providers"]
    assert record["quantizer"]["provider"] == "whole_of_parts:broken_q"
    assert [export["provider"] for export in record["exports"]] == ["whole_of_parts:broken_e"]
    assert (here / "out" / "exports" / "broken_e" / "x.txt").read_text() == "x"


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_in_a_provider_names_the_plugin_and_the_call(
    qlora: Callable[..., Any],
    write_module: Callable[[str, str], str],
    write_config: Callable[..., Path],
    here: Path,
    place: str,
) -> None:
    name = write_module(f"broken_in_{place}", source(place))
    result = qlora("train", write_config(**ALL), "-p", name, "-q")
    assert (result.code, result.out) == (2, "")
    first = said(result)[0]
    if place == "init":
        assert first.endswith(
            f"quantizer: plugin '{name}' (module {name}) failed to make 'broken_q': ZeroDivisionError: no luck"
        )
        return
    what = "examples('train')" if place == "examples" else place
    assert first == f"error: {PLACES[place]} of module '{name}' failed in {what}: ZeroDivisionError: no luck"
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("tell its author, or choose another provider; the traceback is in ")
    assert "ZeroDivisionError: no luck" in Path(last.rpartition(" ")[2]).read_text()
    if place == "export":
        assert (here / "out" / "adapter").is_dir()
        assert not (here / "out" / "exports" / "broken_e").exists()


def test_a_broken_provider_takes_down_nothing_that_does_not_use_it(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str], write_config: Callable[..., Path]
) -> None:
    name = write_module("broken_everywhere", PARTS.format(**dict.fromkeys([*PLACES, "suits"], "1 / 0")))
    result = qlora("train", write_config(quantizer="none"), "-p", name, "-q")
    assert result.code == 0
    assert result.err == (
        "warning: kernels: auto leaves out 'broken_everywhere:broken_k': kernels 'broken_k' of module 'broken_everywhere' "
        "failed in suits: ZeroDivisionError: division by zero\n"
    )


@pytest.mark.parametrize(
    ("place", "statement", "message"),
    [
        (
            "load_kwargs",
            "return None",
            "error: quantizer 'broken_q' of module '{name}': load_kwargs must return a dict (got None)",
        ),
        ("prepare", "return None", "error: quantizer 'broken_q' of module '{name}': prepare must return the model (got None)"),
        (
            "inject",
            "return None",
            "error: adapter 'broken_a' of module '{name}': inject must return the adapted model (got None)",
        ),
        (
            "apply",
            "return None",
            "error: kernels 'broken_k' of module '{name}': apply must rewrite the model in place and return it (got None)",
        ),
        (
            "training_arguments",
            "return",
            "error: callback 'broken_c' of module '{name}': training_arguments must return a dict (got None)",
        ),
        ("missing", "return 'a CUDA device'", "error: quantizer: 'broken_q' needs a CUDA device; this machine has it not"),
        (
            "build",
            "return 3",
            "error: callback 'broken_c' of module '{name}': build must return a transformers.TrainerCallback (got 3)",
        ),
        (
            "examples",
            "return [1]",
            "error: dataset 'broken_d' of module '{name}': examples must return a datasets.Dataset or None (got [1])",
        ),
        (
            "training_arguments",
            "return {'learning_rate': 1.0}",
            "error: callbacks: one asks for the training argument learning_rate, which is up to training.learning_rate",
        ),
        (
            "training_arguments",
            "return {'remove_unused_columns': True}",
            "error: callbacks: one asks for the training argument remove_unused_columns, which is up to the run directory",
        ),
        (
            "training_arguments",
            "return {'logging_frst_step': True}",
            "error: callbacks: one asks for logging_frst_step, no field of "
            "transformers.TrainingArguments; did you mean 'logging_first_step'?",
        ),
        ("check", "raise qlora_core.ConfigError('not today')", "error: quantizer: not today"),
    ],
)
def test_a_wrong_answer_or_a_refusal_is_said_plainly(
    qlora: Callable[..., Any],
    write_module: Callable[[str, str], str],
    write_config: Callable[..., Path],
    place: str,
    statement: str,
    message: str,
) -> None:
    name = write_module(f"wrong_{place}", source(place, statement))
    result = qlora("train", write_config(**ALL), "-p", name, "-q")
    assert result.code == 2
    assert said(result) == [message.replace("{name}", name)]


@pytest.mark.parametrize("place", ["build", "on_log", "examples", "prepare"])
def test_a_plugin_that_exits_does_not_pass_for_success(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str], write_config: Callable[..., Path], place: str
) -> None:
    name = write_module(f"exits_in_{place}", source(place, "raise SystemExit(0)"))
    result = qlora("train", write_config(**ALL), "-p", name, "-q")
    assert result.code == 2
    assert said(result)[0].startswith(f"error: {PLACES[place]} of module '{name}' failed in {place}")
    assert said(result)[0].endswith(": SystemExit: 0")


@pytest.mark.parametrize(
    ("statement", "warning"),
    [
        ("return None", "kernels 'broken_k' of module '{name}': suits must return a whole number (got None)"),
        ("raise SystemExit('no GPU here')", "kernels 'broken_k' of module '{name}' failed in suits: SystemExit: no GPU here"),
    ],
)
def test_kernels_that_can_not_say_how_they_suit_are_left_out(
    qlora: Callable[..., Any],
    write_module: Callable[[str, str], str],
    write_config: Callable[..., Path],
    statement: str,
    warning: str,
) -> None:
    name = write_module(f"unsuitable_{len(statement)}", source("suits", statement))
    result = qlora("train", write_config(quantizer="none"), "-p", name, "-q")
    assert result.code == 0
    assert result.err == f"warning: kernels: auto leaves out '{name}:broken_k': {warning.replace('{name}', name)}\n"


ODD_PARTS = """
    import threading
    from pydantic import ConfigDict
    import qlora_core

    class Unmade(qlora_core.CallbackFactory):
        name = "unmade"
        def __init__(self, **options): pass
        def build(self, run): return None

    class Unwritable(qlora_core.CallbackFactory):
        name = "unwritable"
        class Options(qlora_core.ProviderOptions):
            model_config = ConfigDict(arbitrary_types_allowed=True)
            lock: object = threading.Event()
            "an event"
        def build(self, run): return None

    @qlora_core.hookimpl
    def qlora_callbacks(): return [Unmade, Unwritable]
"""


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        ("unmade", "TypeError: its __init__ must call super().__init__(**options)"),
        ("unwritable", "PydanticSerializationError: "),
    ],
)
def test_a_provider_that_can_not_be_made_or_written_down_is_named(
    qlora: Callable[..., Any],
    write_module: Callable[[str, str], str],
    write_config: Callable[..., Path],
    callback: str,
    reason: str,
) -> None:
    name = write_module(f"odd_parts_{callback}", ODD_PARTS)
    result = qlora("config", "show", write_config(callbacks=[callback]), "-p", name)
    assert result.code == 2
    assert f"callbacks[0]: plugin '{name}' (module {name}) failed to make '{callback}': {reason}" in result.err
    assert qlora("plugins", "show", callback, "-p", name).code == 0


def test_an_option_of_the_wrong_type_reads_like_any_other_configuration_error(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str], write_config: Callable[..., Path]
) -> None:
    name = write_module("with_options", textwrap.dedent(source()))
    path = write_config(quantizer={"name": "broken_q", "size": "many"})
    result = qlora("config", "show", path, "-p", name)
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "size:" in text)
    assert (result.code, result.err) == (
        2,
        f"error: {path}:{line}: quantizer.size: must be a whole number (got 'many'); how many\n",
    )


def test_equally_suitable_kernels_ask_the_user_to_choose(
    qlora: Callable[..., Any], write_module: Callable[[str, str], str], write_config: Callable[..., Path]
) -> None:
    name = write_module("rival_kernels", source("suits", "return 2"))
    result = qlora("train", write_config(quantizer="none"), "-p", name, "-q")
    choice = "'fused:fused' and 'rival_kernels:broken_k', which suit cpu equally; name one"
    assert (result.code, said(result)) == (2, [f"error: kernels: auto can't choose between {choice}"])
