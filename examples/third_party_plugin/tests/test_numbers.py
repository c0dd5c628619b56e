"""Values, each compared with a reference that is computed in another way."""

import csv
import sqlite3
from pathlib import Path

import pytest
import torch
from qlora_core import ConfigError, DataError, SavedRun, finetune, load_model
from qlora_core.testing.tiny import LowRank, Plain, Words, loss_of, tiny_config, tiny_ids

from qlora_example_parts import MetricsCSV, NFBlocks, SQLite, StopFile, TinyLoRA
from qlora_example_parts.blocks import NFLinear, normal_levels, pack, unpack
from qlora_example_parts.lora import WithLoRA, add, matrices

WIDTHS, SHAPES = (2, 3, 4), ((48, 64), (7, 13), (1, 1), (129, 3))


def layer(shape=(48, 64), bits=4, block_size=64, bias=False):
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=bias).requires_grad_(False)
    return linear, NFLinear(linear, bits, block_size)


# nf_blocks


def test_four_bit_levels_are_the_published_table():
    from bitsandbytes.functional import get_4bit_type

    torch.testing.assert_close(normal_levels(4).float(), get_4bit_type("nf4", device="cpu"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_quantiles_with_one_zero(bits):
    from statistics import NormalDist

    levels, half = normal_levels(bits).tolist(), 2 ** (bits - 1)
    delta = (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (0.5 - delta) * i / half) / quantile(1 - delta) for i in range(1, half + 1)]
    negative = [-quantile(0.5 + (0.5 - delta) * i / (half - 1)) / quantile(1 - delta) for i in range(1, half)]
    assert levels == pytest.approx([*reversed(negative), 0.0, *positive], abs=1e-12)
    assert (len(levels), levels[0], levels[half - 1], levels[-1]) == (2**bits, -1.0, 0.0, 1.0)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_keeps_every_index_and_wastes_nothing(bits, size):
    indices = torch.randint(2**bits, (size,), dtype=torch.uint8)
    packed = pack(indices, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (bits, -(-size // 8))
    assert torch.equal(unpack(packed)[:size], indices)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_each_weight_becomes_the_nearest_level_of_its_block(shape, bits, block_size):
    linear, packed = layer(shape, bits, block_size)
    flat, got = linear.weight.double().view(-1), packed.dequantized()
    assert got.shape == shape
    assert got.dtype == torch.float32
    for start in range(0, flat.numel(), block_size):
        block = flat[start : start + block_size]
        choices = normal_levels(bits) * block.abs().max()
        nearest = choices[(block[:, None] - choices).abs().argmin(dim=1)]
        torch.testing.assert_close(got.view(-1)[start : start + block_size].double(), nearest, rtol=1e-6, atol=1e-9)


def test_zeros_stay_zeros():
    linear, _ = layer()
    linear.weight[:2] = 0
    assert not NFLinear(linear, 4, 64).dequantized()[:2].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_stored_bytes_are_the_bytes_held(shape, bits, block_size):
    _, packed = layer(shape, bits, block_size)
    held = sum(tensor.nbytes for tensor in packed.state_dict().values())
    assert NFBlocks(bits=bits, block_size=block_size).stored_bytes(shape) == held


@pytest.mark.parametrize("bits", WIDTHS)
def test_output_and_gradient_are_those_of_a_float64_product(bits):
    linear, packed = layer((7, 13), bits, 32, bias=True)
    weight = packed.dequantized().double()
    x = torch.randn(2, 5, 13, requires_grad=True)
    y = packed(x)
    torch.testing.assert_close(y.double(), x.double() @ weight.T + linear.bias.double(), rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=1e-5, atol=1e-6)
    assert packed.weight.grad is None
    exact = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packed, exact)


def test_nothing_but_the_packed_weight_is_kept_for_the_backward_pass():
    _, packed = layer((128, 128))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(torch.randn(2, 128, requires_grad=True))
    assert sorted(t.nbytes for t in kept) == [4 * 16, 4 * 128 * 128 // 64, 128 * 128 // 2]


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_computes_as_a_plain_layer_does(autocast):
    linear, packed = layer(bias=True)
    linear.weight = torch.nn.Parameter(packed.dequantized(), requires_grad=False)
    results = []
    for module in (linear, packed):
        x = torch.linspace(-1, 1, 3 * 64, dtype=torch.float32 if autocast else torch.bfloat16).view(3, 64).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = module(x) if autocast or module is packed else module.to(torch.bfloat16)(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        results.append((y, x.grad))
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


# tiny_lora


def test_tiny_lora_starts_at_the_base_and_trains_its_matrices_only():
    base = load_model(tiny_config(), NFBlocks())
    with torch.no_grad():
        before = base(input_ids=tiny_ids(base)).logits
        adapted = TinyLoRA(r=4).inject(base)
        assert torch.equal(adapted(input_ids=tiny_ids(base)).logits, before)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == set(matrices(adapted))
    assert len(trained) == 2 * 2 * 7  # A and B, 2 layers, 7 linear layers in each; not the head


def test_tiny_lora_computes_the_formula():
    linear, packed = layer(bias=True)
    adapted = WithLoRA(packed, r=4, alpha=6.0)
    torch.nn.init.normal_(adapted.B)
    x = torch.randn(3, 64)
    weight = packed.dequantized().double() + 6.0 / 4 * adapted.B.double() @ adapted.A.double()
    torch.testing.assert_close(adapted(x).double(), x.double() @ weight.T + linear.bias.double(), rtol=1e-5, atol=1e-5)


def test_merging_gives_the_adapted_model_s_output_and_leaves_it_plain():
    base = load_model(tiny_config(), None)
    names = [name for name, _ in base.named_parameters()]
    adapted = add(base, 4, 8.0)
    for name, matrix in matrices(adapted).items():
        torch.nn.init.normal_(matrix, std=0.1 if name.endswith("A") else 0.2)
    with torch.no_grad():
        wanted = adapted(input_ids=tiny_ids(base)).logits
        merged = TinyLoRA().merge(adapted)
        torch.testing.assert_close(merged(input_ids=tiny_ids(base)).logits, wanted, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in merged.named_parameters()] == names


def test_loading_takes_r_and_alpha_from_the_file(tmp_path):
    adapted = TinyLoRA(r=2, alpha=5.0).inject(load_model(tiny_config(), None))
    for matrix in matrices(adapted).values():
        torch.nn.init.normal_(matrix, std=0.1)
    TinyLoRA(r=2, alpha=5.0).save(adapted, tmp_path)
    again = TinyLoRA().load(load_model(tiny_config(), None), tmp_path)
    with torch.no_grad():
        assert torch.equal(loss_of(again), loss_of(adapted))


def test_a_rank_beyond_the_smallest_layer_is_refused():
    with pytest.raises(ConfigError, match=r"r: 65 is larger than the layer .* at most 32"):
        TinyLoRA(r=65).check_model(load_model(tiny_config(), None))


# sqlite


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "notes.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER, body TEXT)")
        connection.executemany("INSERT INTO notes VALUES (?, ?)", [(2, "two"), (3, None), (1, "one")])
    connection.close()
    return path


def test_rows_come_in_the_query_s_order(database):
    query = "SELECT body AS text FROM notes WHERE body IS NOT NULL ORDER BY id"
    source = SQLite(path=database, query=query, eval_query=f"{query} DESC")
    assert source.examples("train").to_list() == [{"text": "one"}, {"text": "two"}]
    assert source.examples("eval").to_list() == [{"text": "two"}, {"text": "one"}]
    assert SQLite(path=database, query=query).examples("eval") is None


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELEC body", 'near "SELEC": syntax error'),
        ("SELECT body AS text FROM letters", "no such table: letters"),
        ("SELECT id, body FROM notes", "gives the columns id, body, not text alone; write SELECT ... AS text"),
        ("SELECT body AS text FROM notes ORDER BY id DESC", "row 1 is no text but NoneType"),
        ("SELECT body AS text FROM notes WHERE id > 9", "gives no row"),
        ("DELETE FROM notes", "readonly database"),
        ("SELECT 'a' AS text; SELECT 'b' AS text", "one statement at a time"),
    ],
)
def test_a_query_that_does_not_fit_is_a_data_error(database, query, message):
    with pytest.raises(DataError) as caught:
        SQLite(path=database, query="SELECT 'a' AS text", eval_query=query).examples("eval")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"dataset.eval_query: {database}: ")
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM notes").fetchone() == (3,)
    connection.close()


def test_a_file_that_is_no_database_is_a_data_error(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("This is no database. " * 100)
    with pytest.raises(DataError, match="not a database"):
        SQLite(path=path, query="SELECT body AS text FROM notes").examples("train")


def test_a_path_that_does_not_exist_is_refused_before_anything_starts(tmp_path):
    source = SQLite(path=tmp_path / "none.db", query="SELECT 'a' AS text")
    with pytest.raises(ConfigError) as caught:
        source.check(None, None)
    (problem,) = caught.value.problems
    assert problem.where == ("path",)
    assert "none.db" in problem.what
    assert not (tmp_path / "none.db").exists()


# stop_file and metrics_csv


def run(folder: Path, **more):
    training = {"max_steps": 4, "logging_steps": 1, "learning_rate": 0.01}
    data = {"sequence_length": 16}
    return finetune(tiny_config(), Plain(), LowRank(), Words(), output=folder, data=data, training=training, **more)


def test_training_stops_after_a_checkpoint_once_the_file_exists(tmp_path):
    stop = tmp_path / "stop-all"
    stop.touch()
    finished = run(tmp_path / "stopped", callbacks=[StopFile(path=str(stop))])
    assert [line["step"] for line in finished.run.read_metrics() if "loss" in line] == [1]
    assert [path.name for path in finished.run.checkpoints()] == ["step-1"]
    finished = run(tmp_path / "whole", callbacks=[StopFile()])
    assert finished.run.read_metrics()[-1]["step"] == 4


def test_the_table_has_every_value_of_the_metrics(tmp_path):
    finished = run(tmp_path / "run")
    MetricsCSV().export(SavedRun(finished.run, Plain(), LowRank()), tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = finished.run.read_metrics()
    assert len(rows) == len(lines) > 4
    for row, line in zip(rows, lines, strict=True):
        assert {key: float(value) for key, value in row.items() if value} == {k: v for k, v in line.items() if v is not None}
