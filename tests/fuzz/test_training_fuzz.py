"""Odd values that are no plain mistakes, in real runs of two steps: each trains or is refused by its key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

HUGE = [10**9, 2**31, 2**63, 10**30]
TEMPLATES = {  # what a chat template may be
    "open.jinja": "{% for m in messages %}{{ m.content }}",
    "nothing.jinja": "",
    "constant.jinja": "the same for every chat",
    "raises.jinja": "{{ raise_exception('not this one') }}",
    "endless.jinja": "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
    "loops.jinja": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "itself.jinja": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "zero.jinja": "{{ 1 / 0 }}",
    "undefined.jinja": "{{ messages[7].content.x.y }}",
    "escape.jinja": "{{ messages.__class__.__mro__ }}",
    "import.jinja": "{% include '/etc/passwd' %}",
    "latin.jinja": "\udcff",
    "marks.jinja": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "long.jinja": "{{ 'x' * 10**12 }}",
}
EXTRA: dict[str, list[Any]] = {
    "adam_beta1": [0, 1, 2, -1, "x", "0.5", None, 1e300],
    "adam_beta2": [0, 1, 2, -1],
    "adam_epsilon": [0, -1, 1e300, "x"],
    "data_seed": [0, -1, 10**30, "x", 1.5],
    "dataloader_num_workers": [-1, 1, "x"],
    "dataloader_drop_last": [True],
    "dataloader_persistent_workers": [True],
    "dataloader_pin_memory": [True],
    "dataloader_prefetch_factor": [0, 2, -1],
    "label_smoothing_factor": [0.1, 5, -1],
    "neftune_noise_alpha": [0, 5, -1, "x", 1e300],
    "lr_scheduler_kwargs": [{}, {"x": 1}, "x", "{}", [], {"num_cycles": 3}, {"num_cycles": "x"}, {"min_lr": 1}],
    "optim_args": ["x", "a=b", "", "rank=1", {"a": 1}, 3],
    "optim_target_modules": ["q_proj", [], "(", "all-linear"],
    "accelerator_config": [{}, "x", {"split_batches": True}, {"x": 1}, [], "{}"],
    "train_sampling_strategy": ["random", "sequential", "group_by_length", "x"],
    "logging_strategy": ["no", "steps", "epoch", "x", "best"],
    "logging_first_step": [True, "x"],
    "include_num_input_tokens_seen": ["all", "x", True, "non_padding"],
    "average_tokens_across_devices": [True, False],
    "torch_empty_cache_steps": [0, 1, -1, "x"],
    "prediction_loss_only": [False],
    "eval_delay": [1, -1, 1e300],
    "eval_accumulation_steps": [0, -1, 1],
    "batch_eval_metrics": [True],
    "run_name": ["x", "", 3],
    "ddp_backend": ["x"],
    "ddp_timeout": [0, -1],
    "log_level": ["x", "debug"],
    "full_determinism": [True],
    "tf32": [True],
    "debug": ["underflow_overflow", "x", []],
    "use_liger_kernel": [True],
    "torch_compile_backend": ["x"],
    "torch_compile_mode": ["x"],
    "local_rank": [0, 3],
    "include_for_metrics": [["inputs"], "x", ["x"]],
    "skip_memory_metrics": [False],
    "parallelism_config": [{}, "x", 3],
    "warmup_ratio": [0.5, 2, -1],
    "half_precision_backend": ["x"],
    "hub_token": ["x"],
    "gradient_checkpointing_kwargs": [{"use_reentrant": True}, "x", {"x": 1}],
    "optim": ["sgd"],
    "fsdp_config": [{}, {"x": 1}],
    "save_only_model": [True],
    "restore_callback_states_from_checkpoint": [True],
    "length_column_name": ["x"],
    "enable_jit_checkpoint": [True],
    "liger_kernel_config": [{"x": 1}],
    "use_cpu": [False],
    "project": ["x"],
    "do_train": [False],
    "do_predict": [True],
    "log_on_each_node": [False],
    "logging_dir": ["x"],
}
TEXT: dict[str, list[Any]] = {
    "quantizer": [
        "nf4",
        "fp4",
        "int8",
        "none",
        "ao_int8",
        {"name": "int8", "threshold": 1e300},
        {"name": "nf4", "double_quant": False},
    ]
    + [{"name": "nf4", "compute_dtype": "float16"}, {"name": "fp4", "storage_dtype": "float32"}]
    + [{"name": "nf4", "skip_modules": names} for names in ([""], ["q_proj"], ["model"], ["layers"], ["."], [".*"], ["("])],
    "adapter.r": [1, 32, 33, *HUGE],
    "adapter.alpha": [5e-324, 1e300],
    "adapter.dropout": [0.5, 0.9999999999],
    "adapter.target_modules": [
        *("", ".*", "(", ".*q_proj", [], ["q_proj"], [""], ["."], "lm_head", ["lm_head"], ["embed_tokens"], "(a+)+$", "norm"),
        *(["q_proj", "q_proj"], ["model.layers.0.self_attn.q_proj"], "all_linear", ["all-linear"]),
    ],
    "adapter.bias": ["all", "lora_only"],
    "adapter.init": ["gaussian", "pissa"],
    "adapter.use_dora": [True],
    "adapter.use_rslora": [True],
    "adapter.modules_to_save": [["lm_head"], ["norm"], ["embed_tokens"], ["model"], [""], ["q_proj"], ["layers"], ["."], ["0"]],
    "adapter": [
        {"name": "peft", "method": name}
        for name in (
            "ia3",
            "vera",
            "boft",
            "oft",
            "loha",
            "lokr",
            "randlora",
            "hra",
            "ln_tuning",
            "prompt_tuning",
            "prefix_tuning",
            "p_tuning",
            "adalora",
            "fourierft",
            "x",
            "xlora",
            "vblora",
            "c3a",
            "shira",
            "miss",
            "road",
            "trainable_tokens",
            "cpt",
            "bone",
            "LORA",
        )
    ]
    + [
        {"name": "peft", "method": "lora", "config": c}
        for c in (
            {"r": 0},
            {"r": -1},
            {"r": 10**30},
            {"lora_alpha": 0},
            {"rank_pattern": {"x": 1}},
            {"rank_pattern": {"(": 1}},
            {"alpha_pattern": {"q_proj": 0}},
            {"layers_to_transform": [99]},
            {"layers_to_transform": -1},
            {"layers_pattern": "x"},
            {"exclude_modules": ".*"},
            {"exclude_modules": "("},
            {"target_modules": "("},
            {"target_modules": None},
            {"target_parameters": ["x"]},
            {"lora_dropout": 2},
            {"lora_dropout": -1},
            {"megatron_config": {}},
            {"loftq_config": {"x": 1}},
            {"eva_config": {"x": 1}},
            {"corda_config": {}},
            {"modules_to_save": "norm"},
            {"fan_in_fan_out": True},
            {"use_qalora": True},
            {"arrow_config": {}},
            {"lora_bias": True},
            {"trainable_token_indices": [1]},
            {"trainable_token_indices": [-1]},
            {"trainable_token_indices": {"x": [1]}},
            {"inference_mode": True},
            {"bias": "all"},
            {"ensure_weight_tying": True},
            {"layer_replication": [[0, 9]]},
            {"peft_type": "x"},
            {"task_type": "x"},
            {"revision": 3},
            {"base_model_name_or_path": "x"},
            {"auto_mapping": {}},
        )
    ]
    + [{"name": "peft", "method": "prompt_tuning", "config": {"num_virtual_tokens": n}} for n in (0, -1, 1, 500)],
    "data.sequence_length": [2, 3, 7, 31, 256, 257, 1000],
    "data.packing": [False],
    "data.eval_fraction": [0, 1e-300, 0.5, 0.999, 0.9999999999999999],
    "data.train_on": ["all", "completion", "assistant", "last_turn"],
    "data.truncate": [True],
    "data.on_problem": ["skip", "warn"],
    "data.deduplicate": [True],
    "data.pad_to_multiple_of": [1, 3, 100],
    "data": [
        {"streaming": True, "eval_fraction": 0, "sequence_length": 32, **more}
        for more in (
            {},
            {"gate_rows": 10**30},
            {"buffer": 10**30},
            {"gate_rows": 1, "buffer": 1},
            {"packing": False},
            {"deduplicate": True},
            {"truncate": True},
        )
    ],
    "tokens.add": [
        ["x"],
        [" a "],
        ["\u00e9e\u0301"],
        ["<a>", "<b>"],
        ["\t"],
        ["\n"],
        ["y" * 1000],
        ["\x00"],
        ["<eos>"],
        ["the"],
    ],
    "model.dtype": ["bfloat16", "float16", "float32"],
    "model.upcast": [True],
    "model.cache": [False],
    "model.revision": ["x", ""],
    "model.trust_remote_code": [True],
    "kernels": ["fused", "reference", {"name": "fused", "linear": False}, {"name": "fused", "compiled": False, "mlp": False}],
    "callbacks": [
        [],
        ["progress"],
        ["early_stopping"],
        ["progress", "progress"],
        [{"name": "early_stopping", "patience": 10**30}],
    ]
    + [
        [{"name": "transformers", "integration": x}]
        for x in (
            "tensorboard",
            "all",
            "x",
            ":",
            "os:path",
            "os:x",
            "transformers:Trainer",
            "transformers:TrainerCallback",
            "transformers:ProgressCallback",
            "transformers:EarlyStoppingCallback",
            "a b:c",
            "..:x",
            "codecarbon",
            "json:JSONDecoder",
        )
    ]
    + [[{"name": "transformers", "integration": "transformers:PrinterCallback", "arguments": {"x": 1}}]]
    + [[{"name": "early_stopping", "min_delta": 1e300, "patience": 1}]],
    "exports": [["merged"], ["merged", "merged"], ["peft:merged"], ["merged:merged"]]
    + [
        [{"name": "merged", "max_shard_size": size}]
        for size in ("0GB", "1KB", "1kb", "1 MB", "99999999999999999999GB", "1KIB", "1GiB", "٣GB")
    ]
    + [[{"name": "merged", "dtype": dtype}] for dtype in ("float16", "bfloat16")],
    "output": [
        "a/b/c",
        "o" * 300,
        "/dev/null/x",
        "/proc/x",
        "~no-such-user/x",
        "run.yaml",
        "o\x00",
        "o\nx",
        " ",
        ".",
        "é🦙",
        "-x",
        "a:b",
    ],
    "training.max_steps": [1, 3],
    "training.epochs": [1e-300, 0.001, 1e300],
    "training.batch_size": [1, 7, 64],
    "training.eval_batch_size": [1, 1000],
    "training.gradient_accumulation": [3, 50, *HUGE],
    "training.learning_rate": [5e-324, 1e-30, 1e3, 1e30, 1e300],
    "training.scheduler": [
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "cosine_warmup_with_min_lr",
        "greedy",
        "",
        "x",
    ],
    "training.warmup": [0, 0.5, 0.9999, 1, 2, 1e9, 1e300],
    "training.weight_decay": [1e30, 1e300],
    "training.max_grad_norm": [0, 1e-300, 1e300],
    "training.gradient_checkpointing": ["none", "selective", "full", "auto", True, False],
    "training.mixed_precision": ["none", "fp16", "bf16"],
    "training.seed": [2**32 - 1],
    "training.keep": ["best"],
    "training.eval_steps": [1, 2, *HUGE],
    "training.eval_at_start": [True],
    "training.save_steps": [1, *HUGE],
    "training.save_total_limit": [1, None, *HUGE],
    "training.logging_steps": [1, *HUGE],
    "dataset.encoding": [
        "utf-16",
        "utf-7",
        "idna",
        "punycode",
        "unicode_escape",
        "rot13",
        "hex",
        "ascii",
        "latin-1",
        "UTF8",
        "undefined",
        "cp037",
        "raw_unicode_escape",
        "utf-8-sig",
        "iso2022_jp",
        "hz",
        "mbcs",
        "",
    ],
    "dataset.separator": ["\n", " ", "e", "\x00", "x" * 5000],
    "dataset.path": [
        ["{text}", "{text}"],
        "{here}/*.txt",
        "{here}",
        "{here}/**",
        "/proc/self/mem",
        "/proc/self/environ",
        "/dev/zero",
        "~no-such-user/x",
        "{text}\x00",
        "{here}/[",
        ["{text}", "{here}/none"],
    ],
    "dataset.eval_path": ["{text}", "{here}", "none"],
    "weights": [[1e-300, 1], [1e300, 1], [2**31, 1], [1000.5, 1], [1, 1], [0.001, 0.001]],
}
OPTIMIZERS = [
    "adamw_torch",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_8bit",
    "paged_adamw_8bit",
    "lion_8bit",
    "lomo",
    "galore_adamw",
    "grokadamw",
    "schedule_free_adamw",
    "apollo_adamw",
    "adamw_apex_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_anyprecision",
    "adalomo",
    "stable_adamw",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "ademamix",
    "rmsprop_bnb",
    "paged_lion_32bit",
    "galore_adafactor_layerwise",
    "x",
    "",
]
PAIRS: dict[str, list[Any]] = {
    "data.template": [
        "chatml",
        "llama3",
        "mistral",
        "gemma",
        "phi",
        "plain",
        "none",
        "x",
        "~no-such-user/x",
        "a/b",
        "\x00",
        "{here}",
        "/proc/self/mem",
        "/dev/null",
    ]
    + [f"{{here}}/{name}" for name in TEMPLATES],
    "data.train_on": ["auto", "all", "completion", "assistant", "last_turn"],
    "data.sequence_length": [2, 3, 16, 256],
    "data.on_problem": ["skip", "warn"],
    "data.truncate": [True],
    "data.packing": [False],
    "data.eval_fraction": [0, 0.999],
    "dataset": [
        {"name": "records", "path": "{pairs}", **more}
        for more in (
            {"prompt": "completion"},
            {"prompt": "prompt", "completion": "prompt"},
            {"prompt": "x"},
            {"prompt": "a[].b"},
            {"prompt": "[]"},
            {"prompt": "a..b"},
            {"text": "prompt"},
            {"text": "\x00"},
            {"messages": "prompt"},
            {"format": "chat"},
            {"format": "tokenized"},
            {"format": "text"},
            {"split": "test"},
            {"roles": {"x": "user"}},
            {"roles": {"": "user"}},
            {"system": "completion"},
            {"input": "completion"},
            {"tools": "prompt", "messages": "completion"},
            {"eval_path": "{pairs}"},
        )
    ],
    "dataset.path": [
        "{here}",
        "{here}/*.json*",
        "{text}",
        "nobody/nothing",
        "a/b",
        ["{pairs}", "{pairs}"],
        "{here}/[",
        "/proc/self/mem",
    ],
}


@pytest.fixture
def ground(here: Path, text: str) -> dict[str, Path]:
    """A text, prompts and templates, in a folder of their own."""
    folder = here.parent / "ground"
    folder.mkdir()
    for name, source in TEMPLATES.items():
        (folder / name).write_text(source, encoding="utf-8", errors="surrogateescape")
    (folder / "text.txt").write_text(text[:4_000], encoding="utf-8")
    lines = "".join(f'{{"prompt": "What is {n}?", "completion": "It is {n}."}}\n' for n in range(40))
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
    return {"here": folder, "text": folder / "text.txt", "pairs": folder / "pairs.jsonl"}


@st.composite
def oddities(draw: Callable[..., Any], table: dict[str, list[Any]], most: int) -> dict[str, Any]:
    """Return one value for each of some keys."""
    keys = draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=most, unique=True))
    return {key: draw(st.sampled_from(table[key])) for key in keys}


def _filled(value: Any, ground: dict[str, Path]) -> Any:
    if isinstance(value, str):
        for name, path in ground.items():
            value = value.replace(f"{{{name}}}", str(path))
        return value
    if isinstance(value, list):
        return [_filled(item, ground) for item in value]
    return {key: _filled(item, ground) for key, item in value.items()} if isinstance(value, dict) else value


@pytest.fixture
def trained(
    qlora: Callable[..., Any], here: Path, tiny_model: Path, ground: dict[str, Path], snapshot: Any
) -> Callable[[dict[str, Any], str], str]:
    """Return a function that trains two steps with the given changes, and says how that ended, or fails."""
    before = snapshot(ground["here"])

    def run(changes: dict[str, Any], dataset: str) -> str:
        config: dict[str, Any] = {
            "model": {"path": str(tiny_model)},
            "adapter": {"name": "lora", "r": 2},
            "dataset": {"name": "text", "path": "{text}"} if dataset == "text" else {"name": "records", "path": "{pairs}"},
            "data": {"sequence_length": 32},
            "tokens": {},
            "callbacks": [],
            "training": {"max_steps": 2, "batch_size": 1, "logging_steps": 1, "extra": {}},
            "output": "out",
        }
        for key in sorted(changes):  # whole sections before what is in them
            section, _, inner = key.partition(".")
            if key == "weights":
                config["dataset"] = [{"name": "text", "path": "{text}", "weight": weight} for weight in changes[key]]
            elif key.startswith("extra "):
                config["training"]["extra"][key.removeprefix("extra ")] = changes[key]
            elif inner and isinstance(config[section], dict):
                config[section] = config[section] | {inner: changes[key]}
            elif not inner:
                config[key] = changes[key]
        (here / "run.yaml").write_text(yaml.safe_dump(_filled(config, ground)), encoding="utf-8")
        result = qlora("train", "run.yaml", "-q")
        config_left = (here / "run.yaml").exists()
        for path in here.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if result.code not in (0, 2) or "Traceback" in result.err or "this is a defect" in result.err:
            raise AssertionError(f"gives {result.code}: {result.err[-2500:]}")
        if not config_left or snapshot(ground["here"]) != before:
            raise AssertionError("a file has changed")
        keys = {part for key in changes for part in key.replace("extra ", "extra.").split(".")} | {
            "dataset",
            "run.yaml:",
            "pairs.jsonl:",
        }
        if result.code and not any(key in result.err for key in keys - {"weights"}):
            raise AssertionError(f"names none of {', '.join(sorted(keys))}: {result.err[-1500:]}")
        return "refused" if result.code else "trained"

    return run


TABLE = TEXT | {f"extra {name}": values for name, values in EXTRA.items()} | {"training.optimizer": OPTIMIZERS}


def test_odd_values_train_or_are_refused(explore: Any, trained: Callable[..., str]) -> None:
    trained({}, "text")  # what is imported first is not to count
    explore(oddities(TABLE, 2), lambda changes: trained(changes, "text"), short=2, long=300)


def test_odd_values_for_prompts_train_or_are_refused(explore: Any, trained: Callable[..., str]) -> None:
    trained({}, "pairs")
    explore(oddities(PAIRS, 2), lambda changes: trained(changes, "pairs"), short=2, long=100)
