"""The kit itself: each defect put into a sound plugin, that of the scaffold, is caught by the check meant for it."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.registry import KINDS
from qlora_core.testing import Conformance, run_checks

Change = tuple[str, str]
LIGHT = {name for name in vars(Conformance) if name.startswith("test_")} | {"test_it_says_how_well_it_suits_a_device"}
MAY_SKIP = {("dataset", "test_the_splits_are_disjoint")}
METHOD = {
    "quantizer": "    def load_kwargs(self, skeleton):",
    "adapter": "    def inject(self, model, new_token_ids=()):",
    "dataset": "    def examples(self, split):",
    "kernels": "    def apply(self, model):",
    "callback": "    def build(self, run):",
    "exporter": "    def export(self, saved, folder):",
}


def defect(kind: str, what: str, check: str, message: str, *changes: Change) -> Any:
    """Return the case: the plugin of *kind* with *changes* fails *check*, which says *message*."""
    return pytest.param(kind, f"test_{check}", message, changes, id=f"{kind}-{what.replace(' ', '-')}")


def method(kind: str, source: str) -> Change:
    """Return the change that adds a method, or overrides one, in the provider of *kind*."""
    return METHOD[kind], f"{source}\n\n{METHOD[kind]}"


BASE = [
    defect(
        "callback",
        "entry imports torch",
        "its_entry_module_is_light",
        "importing mine imports torch",
        ("from pydantic import Field", "import torch  # noqa: F401\nfrom pydantic import Field"),
    ),
    defect(
        "callback",
        "entry can't be imported alone",
        "its_entry_module_is_light",
        "mine can't be imported by itself: ZeroDivisionError",
        ("from pydantic import Field", "import sys\n1 / ('pytest' in sys.modules)\nfrom pydantic import Field"),
    ),
    defect(
        "callback",
        "hook with a default",
        "its_hooks_are_what_pluggy_calls",
        "qlora_callbacks: the argument 'config' has a default and would never be passed",
        ("def qlora_callbacks():", "def qlora_callbacks(config=None):"),
    ),
    defect(
        "callback",
        "hook with an unknown argument",
        "its_hooks_are_what_pluggy_calls",
        "qlora_callbacks: the argument 'config' is unknown to hook API",
        ("def qlora_callbacks():", "def qlora_callbacks(config):"),
    ),
    defect(
        "callback",
        "hook without a mark",
        "its_hooks_are_what_pluggy_calls",
        "qlora_quantizers is not marked; put @qlora_core.hookimpl above it",
        ("@hookimpl\n", "def qlora_quantizers():\n    return []\n\n\n@hookimpl\n"),
    ),
    defect(
        "callback",
        "hook misspelt",
        "its_hooks_are_what_pluggy_calls",
        "qlora_callback is no hook of this qlora-core (hook API 1); it has qlora_quantizers, ",
        ("def qlora_callbacks():", "def qlora_callback():"),
    ),
    defect(
        "callback",
        "another hook fails",
        "it_is_found_and_its_plugin_is_sound",
        "the plugin 'mine' is failed: qlora_quantizers: ZeroDivisionError",
        ("@hookimpl\n", "@hookimpl\ndef qlora_quantizers():\n    return [1 / 0]\n\n\n@hookimpl\n"),
    ),
    defect(
        "callback",
        "provides nothing",
        "it_is_found_and_its_plugin_is_sound",
        "unknown callback 'mine'",
        ("return [Mine]", "return []"),
    ),
    defect(
        "callback",
        "no docstring",
        "it_says_what_it_is",
        "Mine has no docstring",
        ('    """Stops training, after a checkpoint, once the time is up."""\n', ""),
    ),
    defect(
        "callback",
        "unknown options allowed",
        "unknown_options_are_refused",
        'it takes an option "no_such_option"',
        ("    minutes:", '    model_config = {"extra": "allow"}\n    minutes:'),
    ),
    defect(
        "callback",
        "unknown options ignored",
        "unknown_options_are_refused",
        'it takes an option "no_such_option"',
        ("    minutes:", '    model_config = {"extra": "ignore"}\n    minutes:'),
    ),
    defect(
        "callback",
        "options not frozen",
        "unknown_options_are_refused",
        "options can be changed after validation",
        ("    minutes:", '    model_config = {"frozen": False}\n    minutes:'),
    ),
    defect(
        "callback",
        "option not described",
        "every_option_is_described",
        "no description: minutes",
        (', description="training time after which the run ends"', ""),
    ),
    defect(
        "callback",
        "option that is no JSON",
        "options_survive_json",
        "options can't be written to config.yaml and read again",
        ("    minutes: float = Field(60, gt=0", "    minutes: object = Field(default_factory=object"),
    ),
    defect(
        "callback",
        "option that comes back otherwise",
        "options_survive_json",
        "read again they are Options(minutes=[1, 2]), not Options(minutes=(1, 2))",
        ("    minutes: float = Field(60, gt=0", "    minutes: object = Field((1, 2)"),
    ),
]

STRAIGHT = "        return _Product.apply(x, self.weight, self.scale, self.bias)"
QUANTIZER = [
    defect(
        "quantizer",
        "logits not finite",
        "logits_keep_their_shape_and_are_finite",
        "logits are not finite",
        ("return F.linear(x,", 'return float("nan") * F.linear(x,'),
    ),
    defect(
        "quantizer",
        "logits of another shape",
        "logits_keep_their_shape_and_are_finite",
        "logits have the shape (2, 24, 32), not (2, 24, 64)",
        ("    return model", "    head.weight.data = head.weight.data[:32]\n    return model"),
    ),
    defect(
        "quantizer",
        "a layer that is no Linear",
        "quantized_layers_are_linear_layers",
        "q_proj is a RowLinear; make it a subclass of torch.nn.Linear",
        ("class RowLinear(torch.nn.Linear):", "class RowLinear(torch.nn.Module):"),
    ),
    defect(
        "quantizer",
        "the head quantised",
        "quantized_layers_are_linear_layers",
        "the output head is quantised",
        ("head = model.get_output_embeddings()", "head = None"),
    ),
    defect(
        "quantizer",
        "nothing quantised",
        "quantized_layers_are_linear_layers",
        "is_quantized is true for no layer of a Llama",
        ("return isinstance(module, RowLinear)", "return not isinstance(module, object)"),
    ),
    defect(
        "quantizer",
        "stored bytes without the scales",
        "stored_bytes_are_the_bytes_held",
        "q_proj: stored_bytes says 4096, the layer holds 4352",
        ("return shape[0] * shape[1] + 4 * shape[0]", "return shape[0] * shape[1]"),
    ),
    defect(
        "quantizer",
        "dequantize scaled",
        "dequantize_is_what_the_layer_multiplies_by",
        "q_proj: the layer's output is not x Q(W)^T",
        ("return module.dequantized()", "return 1.1 * module.dequantized()"),
    ),
    defect(
        "quantizer",
        "dequantize of another shape",
        "dequantize_is_what_the_layer_multiplies_by",
        "q_proj: dequantize gives (4096,), not (64, 64)",
        ("return module.dequantized()", "return module.dequantized().flatten()"),
    ),
    defect(
        "quantizer",
        "backward scaled",
        "dequantize_is_what_the_layer_multiplies_by",
        "q_proj: the gradient of the layer's input is not g Q(W)",
        ("return gradient @ (weight", "return 1.1 * gradient @ (weight"),
    ),
    defect(
        "quantizer",
        "no backward",
        "dequantize_is_what_the_layer_multiplies_by",
        "q_proj: no gradient goes through the layer to its input",
        ("_Product.apply(x, self", "_Product.apply(x.detach(), self"),
    ),
    defect(
        "quantizer",
        "base not frozen",
        "the_base_is_frozen",
        "lm_head.weight requires a gradient",
        ("    return model", "    head.requires_grad_(True)\n    return model"),
    ),
    defect(
        "quantizer",
        "gradients stop",
        "gradients_reach_the_adapter_and_the_base_stays",
        "layers.0.self_attn.q_proj.a got no gradient",
        ("    return model", "    model.model.layers[0].register_forward_hook(lambda m, i, o: o.detach())\n    return model"),
    ),
    defect(
        "quantizer",
        "no gradient at all",
        "gradients_reach_the_adapter_and_the_base_stays",
        "no gradient reaches the adapter",
        ("    return model", "    model.model.norm.register_forward_hook(lambda m, i, o: o.detach())\n    return model"),
    ),
    defect(
        "quantizer",
        "forward changes the weight",
        "gradients_reach_the_adapter_and_the_base_stays",
        "a step changed model.layers.0.self_attn.q_proj.weight",
        (STRAIGHT, f"        self.weight.data.neg_()\n{STRAIGHT}"),
    ),
    defect(
        "quantizer",
        "eval repacks",
        "evaluating_changes_nothing",
        "loss or gradients differ after an evaluation",
        (STRAIGHT, f"        if not self.training:\n            self.weight.data.neg_()\n{STRAIGHT}"),
    ),
    defect(
        "quantizer",
        "load changes bits",
        "saving_and_loading_gives_the_same_bits",
        "after loading",
        method(
            "quantizer",
            "    def load(self, folder):\n        model = super().load(folder)\n"
            "        model.lm_head.weight.data.mul_(1.0001)\n        return model",
        ),
    ),
    defect(
        "quantizer",
        "save loses the constants",
        "saving_and_loading_gives_the_same_bits",
        "logits differ by up to",
        ('self.register_buffer("scale", scale)', 'self.register_buffer("scale", scale, persistent=False)'),
    ),
    *(
        defect(
            "quantizer",
            f"pickle in {name}",
            "saving_and_loading_gives_the_same_bits",
            f"{name} is a pickle, which runs code when it is loaded",
            method(
                "quantizer",
                "    def save(self, model, folder):\n        import torch\n\n"
                f"        torch.save(model.state_dict(), folder / {name!r})",
            ),
        )
        for name in ("model.bin", "weights.data")
    ),
]

LAYER = "        y = self.layer(x)"
ADAPTER = [
    defect(
        "adapter",
        "starts elsewhere",
        "it_starts_as_the_base",
        "before the first step",
        ("torch.zeros(layer.out_features, r, device=device)", "torch.full((layer.out_features, r), 0.1, device=device)"),
    ),
    defect(
        "adapter",
        "trains the base",
        "only_its_parameters_get_gradients",
        "adapter 'mine' would train parameters of the base model: ",
        ("return wrap(model, self.options.r, self.options.alpha)", "return wrap(model, 8, 16).requires_grad_(True)"),
    ),
    defect(
        "adapter",
        "parameters unused",
        "only_its_parameters_get_gradients",
        "no gradient reaches its parameters",
        ("return y + self.scale *", "return y\n        return y + self.scale *"),
    ),
    defect(
        "adapter",
        "one parameter unused",
        "only_its_parameters_get_gradients",
        "spare requires a gradient and got none",
        ("        device = layer", "        self.spare = torch.nn.Parameter(torch.ones(1))\n        device = layer"),
    ),
    defect(
        "adapter",
        "gradients of 0",
        "only_its_parameters_get_gradients",
        "all gradients are 0",
        ("return y + self.scale *", "return y + 0 * self.scale *"),
    ),
    defect(
        "adapter",
        "changes the base in training",
        "a_step_leaves_the_base_and_changes_the_output",
        "a step changed model.layers.0.self_attn.q_proj.weight, of the base",
        (LAYER, f"        if self.layer.training:\n            self.layer.weight.data.mul_(1.001)\n{LAYER}"),
    ),
    defect(
        "adapter",
        "steps change nothing",
        "a_step_leaves_the_base_and_changes_the_output",
        "two steps changed nothing",
        ("return y + self.scale *", "return y + 0 * self.scale *"),
    ),
    defect(
        "adapter",
        "load loses the weights",
        "saving_and_loading_gives_the_same_logits",
        "after loading",
        ("matrix.copy_(stored[name])", "matrix.shape == stored[name].shape"),
    ),
    defect(
        "adapter",
        "load leaves it trainable",
        "saving_and_loading_gives_the_same_logits",
        "q_proj.a requires a gradient after loading",
        ("return model.requires_grad_(False)", "return model"),
    ),
    defect(
        "adapter",
        "pickle",
        "saving_and_loading_gives_the_same_logits",
        "adapter.safetensors is a pickle",
        ("    save_file({", "    torch.save(matrices(model), folder / FILE)\n    return\n    save_file({"),
    ),
    defect(
        "adapter",
        "skips packed layers",
        "packed_layers_are_adapted_too",
        "leaves nothing to train",
        ("if isinstance(m, torch.nn.Linear) and", "if type(m) is torch.nn.Linear and"),
    ),
    defect(
        "adapter",
        "reads the weight as a matrix",
        "packed_layers_are_adapted_too",
        "shapes cannot be multiplied",
        (LAYER, "        y = torch.nn.functional.linear(x, self.layer.weight.to(x.dtype), self.layer.bias)"),
    ),
    defect(
        "adapter",
        "merge without the scale",
        "merging_keeps_the_output",
        "merged, logits differ by up to",
        ("module.layer.weight += module.scale * (module.b", "module.layer.weight += (module.b"),
    ),
    defect(
        "adapter",
        "merge leaves wrappers",
        "merging_keeps_the_output",
        "the merged model has other parameters than the base",
        ("            model.set_submodule(name, module.layer)\n", "            module.b.zero_()\n"),
    ),
]

ROWS = 'datasets.Dataset.from_dict({"text": texts})'
NO_SPLIT = '        if split == "eval":\n            return None\n'
SCHEMA = "the_training_split_has_rows_of_a_known_schema"
STREAM = "a_stream_gives_the_same_rows_and_goes_on_from_any_position"
STREAMED = (
    "@hookimpl",
    """    def stream(self, position=None):
        rows = self.examples("train")
        for index in range(position or 0, len(rows)):
            yield rows[index], index + 1


@hookimpl""",
)
DATASET = [
    defect("dataset", "no Dataset", SCHEMA, "train: a list is no datasets.Dataset", (ROWS, "texts")),
    defect("dataset", "no training split", SCHEMA, "train: a NoneType is no datasets.Dataset", (ROWS, "None")),
    defect("dataset", "empty", SCHEMA, "train: there are no rows", ('{"text": texts}', '{"text": []}')),
    defect("dataset", "other columns", SCHEMA, "the columns are ['content']", ('{"text": texts}', '{"content": texts}')),
    defect("dataset", "text None", SCHEMA, "train, row 0: text is None", ('{"text": texts}', '{"text": [None, *texts]}')),
    defect(
        "dataset",
        "labels too short",
        SCHEMA,
        "train, row 0: 2 labels for 3 tokens",
        ('{"text": texts}', '{"input_ids": [[3, 4, 5]], "labels": [[3, 4]]}'),
    ),
    defect("dataset", "a row of no tokens", SCHEMA, "row 1: no tokens", ('{"text": texts}', '{"input_ids": [[3, 4], []]}')),
    defect(
        "dataset",
        "negative tokens",
        SCHEMA,
        "train, row 0: input_ids are no token ids",
        ('{"text": texts}', '{"input_ids": [[3, -1]]}'),
    ),
    defect(
        "dataset",
        "random order",
        "two_readings_are_the_same",
        "train: two readings differ",
        ('"""Reading the file. Imported late."""', "import random"),
        (f"    return {ROWS}", f"    random.shuffle(texts)\n    return {ROWS}"),
    ),
    defect(
        "dataset",
        "splits overlap",
        "the_splits_are_disjoint",
        "50 rows stand in both splits, such as {'text': 'Line 0",
        (NO_SPLIT, ""),
    ),
    defect(
        "dataset",
        "continues that is no truth value",
        SCHEMA,
        "train, row 0: continues is 'no', neither True nor False",
        ('{"text": texts}', '{"text": texts, "continues": ["no"] * len(texts)}'),
    ),
    defect(
        "dataset",
        "labels that are no tokens",
        SCHEMA,
        "train, row 0: labels are neither token ids nor -100",
        ('{"text": texts}', '{"input_ids": [[3, 4]], "labels": [[3, -1]]}'),
    ),
    defect(
        "dataset",
        "rows that give no tokens",
        "the_rows_become_blocks",
        "gives no tokens in the train data; it is empty",
        ('{"text": texts}', '{"text": []}'),
    ),
    defect(
        "dataset",
        "completions that are numbers",
        SCHEMA,
        "train, row 0: completion is 0",
        ('{"text": texts}', '{"prompt": texts, "completion": list(range(len(texts)))}'),
    ),
    defect(
        "dataset",
        "chats of an unknown role",
        "the_rows_become_blocks",
        "1 row with a role that is not known: row 1: turn 1: role 'human'",
        ('{"text": texts}', '{"messages": [[{"role": "human", "content": "x"}]]}'),
    ),
    defect(
        "dataset",
        "a stream without its first row",
        STREAM,
        "the rows of the stream are not those of the training split",
        STREAMED,
        ("range(position or 0,", "range(position or 1,"),
    ),
    defect(
        "dataset",
        "a stream that forgets its position",
        STREAM,
        "from the position after row 1 on, the stream gives other rows",
        STREAMED,
        ("range(position or 0,", "range(0,"),
    ),
    defect("dataset", "no rows to train on", "the_rows_become_blocks", "the training split is None", (ROWS, "None")),
]

NORM = "    return F.rms_norm("
KERNELS = [
    defect("kernels", "other logits", "logits_are_the_reference_s", "logits: 0.0", (NORM, "    return 1.01 * F.rms_norm(")),
    defect(
        "kernels",
        "other logits in eval mode",
        "logits_are_the_reference_s",
        "from the reference, relative to it",
        (NORM, "    return (1 if self.training else 1.01) * F.rms_norm("),
    ),
    defect(
        "kernels",
        "gradients dropped",
        "loss_and_gradients_are_the_reference_s",
        "no gradient reaches the adapter",
        ("F.rms_norm(hidden_states", "F.rms_norm(hidden_states.detach()"),
    ),
    defect(
        "kernels",
        "gradients doubled",
        "loss_and_gradients_are_the_reference_s",
        "from the reference, relative to it",
        ("F.rms_norm(hidden_states", "F.rms_norm(2 * hidden_states - hidden_states.detach()"),
    ),
    defect(
        "kernels",
        "base made trainable",
        "loss_and_gradients_are_the_reference_s",
        "other parameters are trained: model.layers.0.input_layernorm.weight",
        ("            module.forward =", "            module.requires_grad_(True)\n            module.forward ="),
    ),
    defect(
        "kernels",
        "suits says a text",
        "it_says_how_well_it_suits_a_device",
        "suits('cpu') gives 'very'",
        ("        return 0", '        return "very"'),
    ),
    defect(
        "kernels",
        "suits says less than nothing",
        "it_says_how_well_it_suits_a_device",
        "suits('cpu') gives -1",
        ("        return 0", "        return -1"),
    ),
]

STEP_END = "    def on_step_end("
CALLBACK = [
    defect(
        "callback",
        "builds no callback",
        "it_builds_a_trainer_callback",
        "build returns 3600",
        ("return StopAfter(60 * self.options.minutes)", "return 60 * self.options.minutes"),
    ),
    defect(
        "callback",
        "builds a class",
        "it_builds_a_trainer_callback",
        "build returns <class 'mine.implementation.StopAfter'>",
        ("return StopAfter(60 * self.options.minutes)", "return StopAfter"),
    ),
    defect(
        "callback",
        "unknown training argument",
        "its_training_arguments_are_known",
        "no_such_argument",
        method("callback", '    def training_arguments(self):\n        return {"no_such_argument": 1}'),
    ),
    defect(
        "callback",
        "fails in an empty run",
        "it_survives_an_empty_run",
        "division by zero",
        (STEP_END, f"    def on_train_end(self, args, state, control, **kwargs):\n        1 / state.global_step\n\n{STEP_END}"),
    ),
    defect(
        "callback",
        "fails in a run",
        "it_goes_through_a_run",
        "failed in on_log: KeyError: 'loss'",  # the last line of a log has none
        (STEP_END, f'    def on_log(self, args, state, control, logs, **kwargs):\n        logs["loss"]\n\n{STEP_END}'),
    ),
    defect(
        "callback",
        "takes the loss out of the log",
        "it_goes_through_a_run",
        "no step was logged",
        (
            STEP_END,
            '    def on_log(self, args, state, control, logs, **kwargs):\n        logs.pop("loss", None)\n\n' + STEP_END,
        ),
    ),
]

WRITE = "        write(saved.run.read_metrics(), folder"
STAMP = 'write_text(str(__import__("time").time_ns()))'
EXPORTER = [
    defect(
        "exporter",
        "writes nothing",
        "it_writes_a_finished_run",
        "it wrote no file",
        (WRITE, f"        return\n{WRITE}"),
    ),
    defect(
        "exporter",
        "pickle",
        "it_writes_a_finished_run",
        "run.data is a pickle",
        (WRITE, f'        (folder / "run.data").write_bytes(__import__("pickle").dumps(1))\n{WRITE}'),
    ),
    defect(
        "exporter",
        "changes the run",
        "it_writes_a_finished_run",
        "it changed the run's own files",
        (WRITE, f'        (saved.run.folder / "note.txt").{STAMP}\n{WRITE}'),
    ),
    defect(
        "exporter",
        "writes the time",
        "it_writes_the_same_again",
        "made.txt differs between two exports",
        (WRITE, f'        (folder / "made.txt").{STAMP}\n{WRITE}'),
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_plugin_passes_every_check(kind: str, kit_of: Callable[..., type[Any]]) -> None:
    kit = kit_of(kind)
    skipped = set()
    for check in (name for name in dir(kit) if name.startswith("test_")):
        try:
            getattr(kit(), check)()
        except unittest.SkipTest:
            skipped.add((kind, check))
    assert skipped <= MAY_SKIP


@pytest.mark.parametrize(
    ("kind", "check", "message", "changes"), [*BASE, *QUANTIZER, *ADAPTER, *DATASET, *KERNELS, *CALLBACK, *EXPORTER]
)
def test_a_defect_is_caught_by_the_check_meant_for_it(
    kind: str, check: str, message: str, changes: tuple[Change, ...], kit_of: Callable[..., type[Any]]
) -> None:
    kit = kit_of(kind, *changes)
    with pytest.raises(Exception) as caught:
        getattr(kit(), check)()
    assert not isinstance(caught.value, unittest.SkipTest)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_this_machine_lacks_skips_the_checks_that_need_it(kind: str, kit_of: Callable[..., type[Any]]) -> None:
    lacking = "a CUDA device with compute capability 9"
    kit = kit_of(kind, method(kind, f"    def missing(self):\n        return {lacking!r}"))
    labels = {" ".join((getattr(kit, name).__doc__ or "").split()): name for name in dir(kit) if name.startswith("test_")}
    outcomes = {labels[outcome.check]: outcome for outcome in run_checks(kit)}
    light = {name: outcome.status for name, outcome in outcomes.items() if name in LIGHT}
    heavy = {name: (outcome.status, outcome.detail) for name, outcome in outcomes.items() if name not in LIGHT}
    assert set(light.values()) == {"passed"}
    assert len(light) >= 7
    assert set(heavy.values()) == {("skipped", f"needs {lacking}")}


def test_a_failing_check_is_an_outcome_and_the_others_still_run(kit_of: Callable[..., type[Any]]) -> None:
    outcomes = list(run_checks(kit_of("kernels", ("        return 0", "        return 1 / 0"))))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert [outcome.detail for outcome in failed] == ["ZeroDivisionError: division by zero"]
    assert failed[0].check == "suits gives a whole number, 0 or more, for cpu and cuda"
    assert {outcome.status for outcome in outcomes if outcome not in failed} == {"passed"}
    assert all(outcome.seconds >= 0 for outcome in outcomes)


def test_rows_of_tokens_may_be_longer_than_a_block_of_the_kit(kit_of: Callable[..., type[Any]]) -> None:
    kit = kit_of("dataset", ('{"text": texts}', '{"input_ids": [[3, 4, 5] * 30, [6, 7]]}'))
    assert {outcome.detail for outcome in run_checks(kit) if outcome.status == "failed"} == set()


def test_an_archive_that_holds_no_pickle_is_none(kit_of: Callable[..., type[Any]]) -> None:
    zipped = '__import__("zipfile").ZipFile(folder / "metrics.zip", "w").writestr("metrics.json", "{}")'
    kit = kit_of("exporter", (WRITE, f"        {zipped}\n{WRITE}"))
    kit().test_it_writes_a_finished_run()


def test_a_plugin_beside_another_is_checked_itself(kit_of: Callable[..., type[Any]], site: Path) -> None:
    kit = kit_of("kernels")
    (site / "heavy_neighbour.py").write_text("import torch\n1 / 0\n", encoding="utf-8")
    both = type("Both", (kit,), {"plugins": ("heavy_neighbour", "mine")})
    assert {outcome.detail for outcome in run_checks(both) if outcome.status == "failed"} == set()
