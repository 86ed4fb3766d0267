"""One table of knobs: nothing else lists them, and a row is enough for flags, keys, checks, planner, advice and docs."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from wanvram import config, knobs
from wanvram.cli.flags import add_request_flags, add_strategy_flags, config_from_flags
from wanvram.command_line import strategy_flags
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.knobs import TABLE, Knob
from wanvram.planner.forecasts import choices, situation

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "wanvram"
MOST_FILES = 4
# Ordinary words, counted where they are a key, a flag or Strategy's field.
WORDS = ("precision", "offload", "cfg")
NAMES = {knob.name for knob in TABLE}
LISTS_ALLOWED = ("knobs.py", "config.py")
MADE_UP = Knob("made_up", 3, "how much is made up", touches=("dit",), lossless=False, smaller=lambda now, _: (now - 1,))


def help_of(add: object) -> str:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=500))
    add(parser)  # type: ignore[operator]
    return parser.format_help()


def flagged(*flags: str) -> RunConfig:
    parser = argparse.ArgumentParser()
    add_request_flags(parser)
    add_strategy_flags(parser)
    args = parser.parse_args([*flags, "--prompt", "x"])
    return config_from_flags(args, device=None, weights=None, gpu=None, memory_limit_bytes=None)


def _as_word(name: str) -> str:
    """The quoted key, a strategy's attribute whatever the strategy is called there, and an argument that changes it."""
    attribute = rf"(?:strategy|\bs|base|chosen|plain|asked|other)\.{name}\b"
    return rf"[\"']{name}[\"']|{attribute}|(?:replace|Strategy)\([^()\n]*\b{name}="


def listed_knobs(tree: ast.AST) -> Iterator[set[str]]:
    """The knobs that one tuple, list, set, mapping or call's keywords spell."""
    for node in ast.walk(tree):
        items: list[ast.expr | None] = []
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            items = [*node.elts]
        elif isinstance(node, ast.Dict):
            items = [*node.keys, *node.values]
        keywords = [keyword.arg for keyword in node.keywords] if isinstance(node, ast.Call) else []
        yield {*keywords, *(item.value for item in items if isinstance(item, ast.Constant))} & NAMES


# --- nothing else lists them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_knob_s_name_is_in_four_files_of_the_source_at_most(name: str) -> None:
    knob = knobs.named(name)
    assert knob is not None
    mention = rf"{_as_word(name)}|{knob.flag}\b" if name in WORDS else rf"\b{name}\b"
    files = [path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    found = [str(path.relative_to(SOURCE)) for path in files if re.search(mention, path.read_text(errors="ignore"))]
    assert len(found) <= MOST_FILES, found


def test_no_other_file_holds_a_list_of_knobs() -> None:
    lists = [
        (path.name, named)
        for path in SOURCE.rglob("*.py")
        if path.name not in LISTS_ALLOWED
        for named in listed_knobs(ast.parse(path.read_text(encoding="utf-8")))
        if len(named) > 2
    ]
    assert lists == []


@pytest.mark.parametrize(
    "written",
    [
        'LOSSY = ("precision", "weight_storage", "vae_precision")',
        '{"cfg": "sequential", "offload": True, "t5_cpu": True}',
        '{1: "cfg", 2: "weights_in", 3: "vae_tile"}',
        "replace(strategy, cfg=1, weights_in=2, vae_tile=3)",
    ],
)
def test_a_second_list_of_knobs_would_be_found(written: str) -> None:
    assert any(len(named) > 2 for named in listed_knobs(ast.parse(written)))


def test_the_table_has_a_row_for_every_field_of_strategy_in_its_order() -> None:
    assert [(knob.name, knob.default) for knob in TABLE] == [(f.name, f.default) for f in dataclasses.fields(Strategy)]


# --- what follows from a row -------------------------------------------------------------------------------------------------


def test_every_knob_is_in_the_help_with_its_words_and_values() -> None:
    text = help_of(add_strategy_flags)
    for knob in TABLE:
        assert f"  {knob.flag} " in text, knob.name
        assert knob.help
        assert knob.help in text
        if knob.choices:
            assert f"{knob.flag} {{{','.join(knob.choices)}}}" in text


def test_every_knob_is_a_key_of_its_section() -> None:
    sections = RunConfig.from_dict({"name": "x"}).to_dict()
    for section in (knobs.MODEL, knobs.OPTIMIZATION):
        expected = {knob.name: knob.default for knob in TABLE if knob.section == section}
        assert {key: sections[section][key] for key in sections[section] if key != "device"} == expected


def test_a_value_worth_trying_is_another_one_and_accepted() -> None:
    around = situation(Request.for_task("i2v-14B"))
    strategies = [
        Strategy(),
        Strategy(precision="fp32"),
        Strategy(load_strategy="block", resident_blocks=3, cfg="joint"),
    ]
    for strategy in strategies:
        tried = list(knobs.smaller_values(strategy, around))
        assert tried
        assert all(knob.of(knob.set(strategy, value)) != knob.of(strategy) for knob, value in tried)
    storage = [value for knob, value in knobs.smaller_values(strategies[1], around) if knob is knobs.WEIGHT_STORAGE]
    assert storage == []  # fp8 is refused with fp32


def test_the_planner_decides_what_loses_nothing_and_leaves_the_rest_to_the_user() -> None:
    assert not set(knobs.planned()) & set(knobs.lossy())
    assert [knob.name for knob in knobs.lossy()] == [
        "precision",
        "weight_storage",
        "product_precision",
        "vae_precision",
    ]
    assert all(knob.lossless for change in (*knobs.LEANER, *knobs.FROM.values()) for knob in change.values)


def test_the_page_on_strategy_has_the_rows_flags_and_lossless_marks_of_the_table() -> None:
    page = (ROOT / "docs" / "strategy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\S.*?) \| (\S.*?) \| (\S.*?) \|$", page, re.MULTILINE)
    assert rows == [
        (
            knob.name,
            f"`{knob.flag}`",
            "yes" if knob.lossless else "**no**",
            ", ".join(knob.touches) or "-",
        )
        for knob in TABLE
    ]


# --- a made-up knob takes three places: its row, its field, the code that obeys ------------------------------------------------


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> type[Strategy]:
    @dataclasses.dataclass(frozen=True)
    class Extended(Strategy):
        made_up: int = MADE_UP.default

    monkeypatch.setattr(knobs, "TABLE", (*TABLE, MADE_UP))
    monkeypatch.setattr(config, "Strategy", Extended)
    return Extended


@pytest.mark.usefixtures("made_up")
def test_a_made_up_knob_is_a_flag_a_key_and_part_of_a_command() -> None:
    assert "--made_up MADE_UP" in help_of(add_strategy_flags)
    asked = flagged("--made_up", "7")
    assert asked.to_dict()[knobs.OPTIMIZATION]["made_up"] == MADE_UP.of(asked.strategy) == 7
    assert strategy_flags(asked.strategy)[-2:] == ["--made_up", "7"]
    with pytest.raises(InputError, match=r"optimization\.made_up: 'much' is not a whole number"):
        RunConfig.from_dict({"name": "x", "optimization": {"made_up": "much"}})
    assert RunConfig.from_dict(asked.to_dict()) == asked


@pytest.mark.usefixtures("made_up")
def test_without_its_row_a_key_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "TABLE", TABLE)
    with pytest.raises(InputError, match=r"optimization\.made_up: unknown key"):
        RunConfig.from_dict({"name": "x", "optimization": {"made_up": 1}})


def test_a_made_up_knob_is_asked_for_again_where_it_matters_offered_and_left_to_the_user(
    made_up: type[Strategy],
) -> None:
    one, other = made_up(), MADE_UP.set(made_up(), 5)
    assert choices("dit", one) != choices("dit", other)
    assert choices("vae_decoder", one) == choices("vae_decoder", other)
    assert MADE_UP in knobs.lossy()
    assert MADE_UP not in knobs.planned()
    assert (MADE_UP, 2) in list(knobs.smaller_values(one, situation(Request.for_task("t2v-14B"))))
