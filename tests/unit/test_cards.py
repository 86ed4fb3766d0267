"""The cards: every row's figures and sources, finding one by any name, the list of `wanvram check --cards`, a card of one's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from wanvram.cli.main import main
from wanvram.config import RunConfig
from wanvram.errors import InputError
from wanvram.predict.advice import advise
from wanvram.predict.simulate import simulate
from wanvram.record import RunRecord
from wanvram.simulate.card import card_to_json
from wanvram.simulate.clock import Costs
from wanvram.simulate.gpus import GPUS, card_of_run, cards_with_memory, find_gpu
from wanvram.units import GIB

# --- the table -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", GPUS)
def test_every_card_is_plausible_and_says_what_its_figures_rest_on(key: str) -> None:
    card = GPUS[key]
    assert card.key == key
    assert 0.97 * card.memory_bytes < card.total_bytes <= card.memory_bytes
    assert card.context_bytes + sum(card.module_bytes.values()) < GIB < card.total_bytes
    assert min(card.bf16_flops, card.fp32_flops, card.bandwidth_bytes, card.pcie_bytes) > 1e9
    assert card.pcie_bytes < card.bandwidth_bytes
    assert (card.fp8_flops is not None) == (card.compute_capability >= (8, 9))
    assert 0.45 < card.sustained_mhz / card.boost_mhz < 1.2
    assert card.rates_source
    assert card.clock_source
    assert card.note
    assert card.path is None


def test_only_the_measured_card_says_so() -> None:
    assert [key for key, card in GPUS.items() if card.measured] == ["h200"]
    assert all("estimated" in card.note for key, card in GPUS.items() if key != "h200")


def test_the_h200_keeps_the_rates_that_its_shares_were_fitted_with() -> None:
    card = GPUS["h200"]
    costs = Costs(card)
    assert card.clock_ratio == 1.0
    assert costs.bandwidth == 4.8e12 * 0.77
    assert costs._product_rate(2) == 989e12 * 0.715
    assert costs._product_rate(1) == 1979e12 * 0.62
    assert costs._product_rate(4) == 67e12 * 0.71
    assert costs._conv_rate(4, narrow=False) == 989e12 / 2 * 0.41


@pytest.mark.parametrize(
    ("key", "tflops"), [("h200", 793), ("rtx4090", 160.2), ("a40", 110.6), ("l4", 59.4), ("l40s", 252)]
)
def test_the_sustained_clock_gives_the_rate_it_was_measured_by(key: str, tflops: float) -> None:
    """793: h200.md; 252: github.com/mag-/gpu_benchmark; the others: github.com/zzc0721/torch-performance-test-data."""
    assert GPUS[key].product_flops / 1e12 == pytest.approx(tflops, rel=1e-3)
    assert f"{tflops:g} TFLOP/s" in GPUS[key].clock_source


def test_a_clock_held_back_scales_every_arithmetic_rate_and_not_the_memory() -> None:
    fast = GPUS["rtx4090"]
    slow = replace(fast, boost_mhz=2000.0, sustained_mhz=500.0)
    quick = replace(fast, boost_mhz=2000.0, sustained_mhz=2000.0)
    for itemsize in (1, 2):
        assert Costs(slow)._product_rate(itemsize) == pytest.approx(Costs(quick)._product_rate(itemsize) / 4)
    assert Costs(slow)._conv_rate(4, narrow=True) == pytest.approx(Costs(quick)._conv_rate(4, narrow=True) / 4)
    assert Costs(slow).bandwidth == Costs(quick).bandwidth


def test_float32_without_matrix_units_is_never_faster_for_a_clock_that_matrix_units_hold() -> None:
    card = GPUS["rtx3090"]
    assert card.clock_ratio > 1.3
    assert Costs(card)._product_rate(4) == card.fp32_flops * 0.71


@pytest.mark.parametrize(
    ("gib", "some", "other"), [(8, "rtx4060", "rtx2080ti"), (16, "t4", "rtx3060-12gb"), (24, "rtx4090", "rtx4080")]
)
def test_cards_of_a_memory_size_are_those_sold_with_it(gib: int, some: str, other: str) -> None:
    keys = cards_with_memory(gib * GIB)
    assert some in keys
    assert other not in keys
    assert {GPUS[key].memory_bytes for key in keys} == {gib * GIB}
    assert cards_with_memory(int(gib * GIB * 0.98)) == keys
    assert cards_with_memory(7 * GIB) == []


# --- names ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", GPUS.values(), ids=str)
def test_every_card_is_found_by_its_key_and_its_name(card: Any) -> None:
    assert find_gpu(card.key) is card
    assert find_gpu(card.name) is card
    assert find_gpu(card.name.upper().replace(" ", "_")) is card


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("4090", "rtx4090"),
        ("rtx 4090", "rtx4090"),
        ("RTX_4070", "rtx4070"),
        ("rtx-4090", "rtx4090"),
        ("4070 Ti", "rtx4070ti"),
        (" rtx 4060 ", "rtx4060"),
        ("RTX 4090 24GB", "rtx4090"),
        ("4090 laptop", "rtx4090-laptop"),
        ("6000 Ada", "rtx6000-ada"),
        ("simulated:rtx3060-12gb", "rtx3060-12gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("h100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("H100-PCIE-80GB", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla V100-PCIE-16GB", "v100-16gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtxpro6000-max-q"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", "rtx4090d"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090-laptop"),
        ("NVIDIA GeForce RTX 4070 Ti", "rtx4070ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070ti-super"),
        ("NVIDIA GeForce RTX 4070 SUPER", "rtx4070-super"),
    ],
)
def test_a_card_is_found_by_key_product_or_driver_name(text: str, key: str) -> None:
    assert find_gpu(text).key == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "t",
        "nvidia",
        "80GB",
        "pcie",
        "rtx9999",
        "rtx40",
        "NVIDIA H20-3e",
        "NVIDIA H200 NVL",
        "Quadro RTX 6000",
        "RTX 6000",
        "4090 48GB",
        "NVIDIA GeForce RTX 5090 Ti",
        "NVIDIA GeForce GTX 1660",
        "Tesla V100S-PCIE-32GB",
        "NVIDIA L4S",
    ],
)
def test_a_name_of_no_card_is_never_taken_for_another(text: str) -> None:
    with pytest.raises(
        InputError, match=r"is unknown; .*`wanvram check --cards` lists all, --gpu FILE.yaml describes another"
    ):
        find_gpu(text)


def test_an_unknown_card_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(InputError, match=r"GPU '4090 48GB' is unknown; nearest: rtx4090, "):
        find_gpu("4090 48GB")
    with pytest.raises(InputError, match="nearest: rtx5070ti"):
        find_gpu("rtx 5070 tii")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("A100", "a100-80gb or a100-40gb"),
        ("Tesla V100", "v100-32gb or v100-16gb"),
        ("rtx3060", "rtx3060-12gb or rtx3060-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti-16gb or rtx4060ti-8gb"),
        ("3080 Laptop", "rtx3080-laptop-16gb or rtx3080-laptop-8gb"),
    ],
)
def test_a_name_of_several_sizes_is_refused_with_just_those(text: str, keys: str) -> None:
    with pytest.raises(InputError, match=rf"'{text}' has several sizes; choose {keys} \(--gpu\)$"):
        find_gpu(text)


@pytest.mark.parametrize(
    ("text", "gib", "key"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 7.996, "rtx4060ti-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.99, "rtx4060ti-16gb"),
        ("NVIDIA A100", 39.4, "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", 47.4, "rtx4090"),  # rebuilt cards have the name of what they were
    ],
)
def test_the_memory_a_driver_reports_decides_between_sizes_only(text: str, gib: float, key: str) -> None:
    assert find_gpu(text, int(gib * GIB)).key == key


# --- wanvram check --cards -------------------------------------------------------------------------------------------------------


def test_check_cards_lists_every_card_and_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--cards"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert set(GPUS) <= set(rows)
    assert re.search(r"NVIDIA H200 +141 GB +793\.2 .* 55\.2 +measured$", rows["h200"])
    assert re.search(r"NVIDIA GeForce RTX 4060 8GB +8 GB +30\.7 .* 12\.5 +estimated$", rows["rtx4060"])


def test_check_cards_json_is_one_document_with_every_field_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--cards", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert [card["key"] for card in document["cards"]] == list(GPUS)
    assert document["efficiency"]["product"] == 0.715
    (card,) = [card for card in document["cards"] if card["key"] == "rtx4090"]
    assert card["compute_capability"] == "8.9"
    assert card["memory_bytes"] == 24 * GIB
    assert "TFLOP/s" in card["clock_source"]


def test_check_cards_reaches_no_torch_and_no_driver() -> None:
    code = (
        "import sys; from wanvram.cli.main import main; main(['check', '--cards', '--json']);"
        "sys.exit(bool({'torch', 'pynvml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0


def test_check_cards_does_not_go_with_terminate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--cards", "--terminate", "1"]) == 2
    assert "give one of them" in capsys.readouterr().err


# --- a card of one's own ---------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Path]:
    """Writes the RTX 4060's row, changed, to a file."""

    def write(change: Change | None = None, name: str = "mine.yaml") -> Path:
        row = card_to_json(GPUS["rtx4060"]) | {"key": "mine", "name": "My card"}
        if change is not None:
            change(row)
        (tmp_path / name).write_text(yaml.safe_dump(row))
        return tmp_path / name

    return write


def test_a_row_of_check_cards_json_saved_as_yaml_is_a_card(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """JSON as it is printed is YAML, too."""
    main(["check", "--cards", "--json"])
    for row in json.loads(capsys.readouterr().out)["cards"]:
        path = tmp_path / "card.yaml"
        path.write_text(json.dumps(row | {"key": f"my-{row['key']}", "measured": False}))
        card, known = find_gpu(str(path)), GPUS[row["key"]]
        assert replace(card, key=known.key, path=None, measured=known.measured) == known
        path.unlink()


def test_a_card_of_ones_own_is_found_again_by_its_file(
    own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own(lambda row: row.update(total_bytes=6 * GIB, bf16_flops=10e12))
    card = find_gpu(str(path))
    assert (card.key, card.name, card.total_bytes, card.bf16_flops) == ("mine", "My card", 6 * GIB, 10e12)
    assert find_gpu(card.argument) == card
    monkeypatch.chdir(path.parent)
    assert find_gpu("mine.yaml").key == find_gpu("./mine.yaml").key == "mine"


def test_a_changed_file_is_read_again(own: Callable[..., Path]) -> None:
    path = own()
    before = find_gpu(str(path)).total_bytes
    own(lambda row: row.update(total_bytes=5 * GIB))
    assert find_gpu(str(path)).total_bytes == 5 * GIB != before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda row: row.update(colour="green"), r"mine.yaml: colour: unknown; a card has key, name, memory_bytes, "),
        (
            lambda row: row.pop("boost_mhz"),
            r"mine.yaml: boost_mhz: missing; `wanvram check --cards --json` prints rows",
        ),
        (lambda row: row.update(key="rtx4090"), r"key: 'rtx4090' is a card of the table"),
        (lambda row: row.update(key="My card"), r"key: 'My card'; use small letters"),
        (lambda row: row.update(name=" "), r"name: is empty"),
        (lambda row: row.update(note=None), r"note: None is not text"),
        (lambda row: row.update(measured=True), r"measured: is true for cards measured by this project only"),
        (lambda row: row.update(total_bytes="8GiB"), r"total_bytes: '8GiB' is not a whole number of bytes"),
        (lambda row: row.update(total_bytes=0), r"total_bytes: 0 is not a whole number of bytes from 1"),
        (lambda row: row.update(total_bytes=9 * GIB), r"total_bytes: a driver offers no more than memory_bytes"),
        (lambda row: row.update(context_bytes=8 * GIB), r"context_bytes: leaves nothing of total_bytes"),
        (lambda row: row.update(memory_bytes=True), r"memory_bytes: True is not a whole number"),
        (lambda row: row.update(bf16_flops=-1.0), r"bf16_flops: -1.0 is not a number above 0"),
        (lambda row: row.update(fp32_flops=float("inf")), r"fp32_flops: inf is not a number above 0"),
        (lambda row: row.update(fp32_flops=float("nan")), r"fp32_flops: nan is not a number above 0"),
        (lambda row: row.update(bf16_flops=30.2), r"bf16_flops: 30.2 is too small; it is in operations per second"),
        (lambda row: row.update(bandwidth_bytes=272), r"bandwidth_bytes: 272 is too small; it is in bytes per second"),
        (
            lambda row: row.update(bf16_flops="30e12"),
            r"bf16_flops: '30e12' is not a number above 0; YAML wants 1.65e\+14",
        ),
        (lambda row: row.update(sustained_mhz=0), r"sustained_mhz: 0 is not a number above 0"),
        (lambda row: row.update(bf16_flops=None), r"bf16_flops: None is not a number above 0"),
        (lambda row: row.update(compute_capability="ada"), r"compute_capability: 'ada'; write it as NVIDIA does"),
        (lambda row: row.update(compute_capability="6.1"), r"compute_capability: '6.1'; .* 7.0 or newer"),
        (lambda row: row.update(module_bytes={"cublas": 1}), r"module_bytes: has bytes for each of kernels, cublas"),
        (lambda row: row["module_bytes"].update(cublas=-1), r"module_bytes.cublas: -1 is not a whole number"),
    ],
)
def test_a_bad_field_is_refused_by_name_with_what_is_allowed(
    own: Callable[..., Path], change: Change, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        find_gpu(str(own(change)))


def test_a_file_that_is_no_card_is_refused(tmp_path: Path) -> None:
    for name, text, sentence in (
        ("a.yaml", "- 1\n", "a card is a mapping of fields"),
        ("b.yml", "key: a\nkey: b\n", "key 'key' appears twice"),
        ("c.yaml", "{", "is not valid YAML"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=sentence):
            find_gpu(str(tmp_path / name))
    for name in ("none.yaml", "no/such", str(tmp_path)):
        with pytest.raises(InputError, match="cannot be read"):
            find_gpu(name if "/" in name else str(tmp_path / name))


def test_a_capability_written_as_a_number_is_read_as_it_is_written(own: Callable[..., Path]) -> None:
    assert find_gpu(str(own(lambda row: row.update(compute_capability=12.0)))).compute_capability == (12, 0)
    assert find_gpu(str(own(lambda row: row.update(compute_capability=8.9, fp8_flops=None)))).fp8_flops is None


# --- runs on a card of one's own -------------------------------------------------------------------------------------------------

TINY = ["--task", "t2v-1.3B", "--size", "832*480", "--frame_num", "5", "--sample_steps", "1"]


def test_an_estimate_on_ones_own_card_says_which_card_it_was(
    own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own()
    monkeypatch.chdir(path.parent)
    assert main(["estimate", *TINY, "--gpu", "mine.yaml", "-o", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "simulated:mine"
    record = RunRecord.read(Path("run/record.json"))
    assert record.config["request"]["gpu"] == "mine.yaml"
    assert any(note.startswith("My card: ") and "estimates, not measured on this card" in note for note in record.notes)
    assert main(["estimate", "--config", "run/config.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "simulated:mine"


def test_what_would_make_it_fit_names_the_file_of_ones_own_card(
    own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own(lambda row: row.update(total_bytes=2 * GIB))
    monkeypatch.chdir(path.parent)
    main(["estimate", *TINY, "--load_strategy", "full", "--gpu", "mine.yaml"])
    assert "--vram 2048MiB --gpu mine.yaml" in capsys.readouterr().out


def test_a_record_whose_card_file_is_gone_or_another_names_no_card(own: Callable[..., Path]) -> None:
    path = own()
    assert card_of_run("simulated:mine", str(path)) == find_gpu(str(path))
    assert card_of_run("simulated:other", str(path)) is None
    path.unlink()
    assert card_of_run("simulated:mine", str(path)) is None
    assert card_of_run("simulated:rtx4090", str(path)) is GPUS["rtx4090"]
    assert card_of_run("cuda:NVIDIA GeForce RTX 4090", None) is None


def test_a_series_of_runs_finds_ones_own_card_in_its_processes(
    own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own()
    monkeypatch.chdir(path.parent)
    request = {"task": "t2v-1.3B", "size": "832*480", "frame_num": 5, "sample_steps": 1, "weights": "random"}
    base = {
        "model_config": {"device": "simulated", "load_strategy": "block", "offload": True},
        "request": request | {"gpu": "mine.yaml"},
    }
    for name in ("one", "two"):
        Path(f"{name}.yml").write_text(yaml.safe_dump({"name": name} | base))
    assert main(["profile", "one.yml", "two.yml", "-o", "runs"]) == 0
    assert RunRecord.read(Path("runs/two/record.json")).device == "simulated:mine"


def test_advice_for_a_run_on_ones_own_card_is_computed_on_that_card(own: Callable[..., Path]) -> None:
    request = {"task": "t2v-1.3B", "size": "832*480", "frame_num": 5, "sample_steps": 1, "weights": "random"}
    model = {"device": "simulated", "load_strategy": "full", "offload": True}
    path = own(lambda row: row.update(memory_bytes=16 * GIB, total_bytes=15 * GIB))
    config = RunConfig.from_dict({"name": "own", "model_config": model, "request": request | {"gpu": str(path)}})
    record, _ = simulate(config)
    peak = record.peak_span()
    assert record.device == "simulated:mine"
    assert peak is not None
    (advice,) = advise(config, record, count=1)
    assert advice.base_device_bytes == peak.peak.device_bytes
