"""The tool that changes the code: what it changes, that a sample comes again, and that a change is noticed or not."""

from __future__ import annotations

from pathlib import Path

import pytest

import mutants

ROOT = Path(__file__).parents[2]


def changes(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    (tmp_path / "src/wanvram").mkdir(parents=True)
    (tmp_path / "src/wanvram/x.py").write_text(text)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    found = mutants.mutants_of("x.py")
    data = (tmp_path / "src/wanvram/x.py").read_bytes()
    return {mutant.applied(data).decode() for mutant in found}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = b < c\n", {"a = b <= c\n"}),
        ("a = (b) + 2.0\n", {"a = (b) - 2.0\n", "a = (b) + 2.2\n"}),
        ("if a and b:\n    f(1)\n", {"if a or b:\n    f(1)\n", "if (not (a and b)):\n    f(1)\n", "if a and b:\n    pass\n",
                                   "if a and b:\n    f(2)\n"}),
        ("x = max(1, y)\n", {"x = min(1, y)\n", "x = max(2, y)\n"}),
        ("n += k\n", {"pass\n"}),
        ('def f(a: int = 3) -> "int":\n    """1 < 2"""\n    raise E(f"{a} < 4")\n', {
            'def f(a: int = 4) -> "int":\n    """1 < 2"""\n    raise E(f"{a} < 4")\n'}),
    ],
)  # fmt: skip
def test_what_is_changed(text: str, expected: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert changes(text, monkeypatch, tmp_path) == expected


def test_a_sample_comes_again_from_its_seed_and_reaches_every_module() -> None:
    first, again, other = (mutants.sample(120, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert {mutant.file for mutant in first} == set(mutants.TESTS)


def test_every_module_and_test_file_that_is_named_is_there() -> None:
    for file in mutants.TESTS:
        assert (ROOT / mutants.SOURCE / file).exists(), file
        assert not [name for name in mutants.tests_of(file) if not (ROOT / name).exists()], file


def test_a_change_of_a_unit_is_killed_and_the_source_is_whole_again() -> None:
    bench = mutants.Bench(1, 120)
    (mutant,) = [m for m in mutants.mutants_of("units.py") if m.old == "1024" and m.line == 9]
    try:
        outcome = bench.run(mutant)
        copy = (bench.folder / "0" / mutants.SOURCE / "units.py").read_bytes()
    finally:
        bench.close()
    assert outcome.outcome == "killed"
    assert "test_units.py" in outcome.by or "test_machine_facts.py" in outcome.by
    assert copy == (ROOT / mutants.SOURCE / "units.py").read_bytes()


def test_a_sample_is_judged_by_what_matters() -> None:
    def row(outcome: str, reason: str = "") -> dict[str, object]:
        return {"outcome": outcome, "reason": reason, "place": "x:1:1", "old": "<", "new": "<="}

    killed = [row("killed")] * 17
    assert mutants.judge({"mutants": [*killed, *[row("survived")] * 3]}) == 0
    assert mutants.judge({"mutants": [*killed, *[row("survived")] * 4]}) == 1
    assert mutants.judge({"mutants": [*killed, *[row("survived", "equivalent: speed only")] * 4]}) == 0
