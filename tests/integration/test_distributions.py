"""Wheels in a fresh virtual environment: ours, a third party's with a part of each kind, and newly generated plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_core.registry import KINDS
from qlora_core.scaffold import new_plugin

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "third_party_plugin"

pytestmark = pytest.mark.slow

FROM_PYTHON = """
import json, sys
from qlora_core import finetune
from qlora_example_parts import MetricsCSV, NFBlocks, OneNorm, SQLite, StopFile, TinyLoRA

model, database, output = sys.argv[1:]
finished = finetune(
    model=model,
    quantizer=NFBlocks(bits=3),
    adapter=TinyLoRA(r=4),
    dataset=SQLite(path=database, query="select body as text from pages order by id"),
    kernels=OneNorm(),
    callbacks=[StopFile(path=output + ".stop")],
    exports=[MetricsCSV()],
    data={"sequence_length": 32},
    training={"max_steps": 3, "logging_steps": 1, "save_steps": 2},
    output=output,
)
print(json.dumps(finished.metrics["loss"]))
"""


class Environment:
    """A virtual environment of its own, and running commands in it from a folder that holds no source."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)

    def install(self, *arguments: object) -> None:
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, *map(str, arguments)], check=True)

    def run(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        command = [str(argument) for argument in arguments]
        command[0] = str(self.python.parent / command[0])
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)


def wheel(source: Path, folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "build", "--quiet", "--wheel", "--outdir", folder, source], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Our wheel and the example's, installed as a user would."""
    folder = tmp_path_factory.mktemp("distributions")
    made = Environment(folder)
    made.install(wheel(ROOT, folder / "ours"), wheel(EXAMPLE, folder / "theirs"), "pytest", "hatchling")
    return made


@pytest.fixture(scope="module")
def database(environment: Environment, text: str) -> Path:
    import sqlite3

    path = environment.folder / "pages.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table pages (id integer, body text)")
        rows = [(index, text[start : start + 2_000]) for index, start in enumerate(range(0, 20_000, 2_000))]
        connection.executemany("insert into pages values (?, ?)", rows)
    return path


def configuration(environment: Environment, name: str, **sections: Any) -> Path:
    path = environment.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**sections, "output": str(environment.folder / name)}), encoding="utf-8")
    return path


def test_our_wheel_is_whole(environment: Environment) -> None:
    assert environment.json("qlora", "doctor")["problems"] == []
    plugins = {plugin["name"]: plugin for plugin in environment.json("qlora", "plugins", "list")["plugins"]}
    assert {p["name"] for p in plugins["bitsandbytes"]["provides"]} == {"nf4", "fp4", "int8"}
    assert plugins["example"]["distribution"] == "qlora-example-parts"
    assert {p["kind"] for p in plugins["example"]["provides"]} == set(KINDS)


def test_a_run_of_third_party_parts_from_yaml_trains_saves_and_resumes(
    environment: Environment, tiny_model: Path, database: Path
) -> None:
    path = configuration(
        environment,
        "from-yaml",
        model=str(tiny_model),
        quantizer={"name": "nf_blocks", "bits": 4},
        adapter={"name": "tiny_lora", "r": 4},
        dataset={"name": "sqlite", "path": str(database), "query": "select body as text from pages order by id"},
        kernels="one_norm",
        callbacks=["stop_file"],
        exports=["metrics_csv", "merged"],
        data={"sequence_length": 32},
        training={"max_steps": 4, "logging_steps": 1, "save_steps": 2},
    )
    environment.run("qlora", "train", path)
    folder = environment.folder / "from-yaml"
    whole = {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()}
    record = json.loads((folder / "provenance.json").read_text())["providers"]
    assert (record["quantizer"]["provider"], record["adapter"]["provider"]) == ("example:nf_blocks", "example:tiny_lora")
    assert record["datasets"][0]["distribution"] == "qlora-example-parts"
    assert record["kernels"]["provider"] == "example:one_norm"
    assert (folder / "exports" / "metrics_csv" / "metrics.csv").read_text().startswith("step,")
    assert (folder / "exports" / "merged" / "model.safetensors").is_file()
    environment.run("qlora", "train", path, "--resume", folder / "checkpoints" / "step-2")
    assert {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()} == whole
    assert environment.run("qlora", "generate", folder, "The import", "--max-new-tokens", 3).stdout.startswith("The import")
    refused = environment.run("qlora", "train", path, "--set", "quantizer.bits=many", code=2)
    assert "quantizer.bits: must be " in refused.stderr


def test_a_run_of_third_party_parts_from_python(environment: Environment, tiny_model: Path, database: Path) -> None:
    script = environment.folder / "script.py"
    script.write_text(FROM_PYTHON, encoding="utf-8")
    output = environment.folder / "from-python"
    environment.run("python", script, tiny_model, database, output)
    record = json.loads((output / "provenance.json").read_text())["providers"]
    assert record["quantizer"]["provider"] == "example:nf_blocks"
    assert record["exports"][0]["provider"] == "example:metrics_csv"
    assert len((output / "metrics.jsonl").read_text().splitlines()) >= 3


def test_the_example_passes_its_own_tests_and_the_kit(environment: Environment) -> None:
    assert environment.json("qlora", "plugins", "check", "example")["passed"]
    environment.run("python", "-m", "pytest", EXAMPLE / "tests", "-q", "-p", "no:cacheprovider")


def test_generated_plugins_pass_their_own_tests_as_generated(environment: Environment) -> None:
    folders = []
    for kind in KINDS:
        folders.append(environment.folder / f"new-{kind}")
        new_plugin(f"new-{kind}", kind, folders[-1])
    environment.install("--no-build-isolation", "--no-deps", *folders)
    options = ("--rootdir", environment.folder, "--import-mode=importlib", "-v", "-p", "no:cacheprovider")
    done = environment.run("python", "-m", "pytest", *folders, *options)
    assert all(f"::TestNew{kind.capitalize()}::test_it_says_what_it_is PASSED" in done.stdout for kind in KINDS)
    assert "failed" not in done.stdout
    listed = {plugin["name"]: plugin["status"] for plugin in environment.json("qlora", "plugins", "list")["plugins"]}
    assert {listed[folder.name] for folder in folders} == {"ok"}
