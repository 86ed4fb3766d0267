"""PyTorch's allocator settings: what the user set is honoured or refused in a sentence, and is in force before torch is imported."""

from __future__ import annotations

import pytest

from wanvram.errors import InputError
from wanvram.machine.allocator_settings import NAMES, check_plain, options_of, put_in_force

OLD, NEW = NAMES


def test_both_variables_say_the_same_so_that_which_one_is_read_does_not_matter() -> None:
    environment: dict[str, str] = {}
    put_in_force(True, environment)
    assert environment[OLD] == environment[NEW] == "expandable_segments:True"


@pytest.mark.parametrize("name", NAMES)
def test_what_else_the_user_set_is_kept_whichever_name_he_used(name: str) -> None:
    environment = {name: "max_split_size_mb:64"}
    put_in_force(False, environment)
    assert environment[OLD] == environment[NEW] == "max_split_size_mb:64,expandable_segments:False"


@pytest.mark.parametrize("name", NAMES)
def test_a_contradiction_names_both_sides(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} is 'expandable_segments:False' but .* expandable_segments: True"):
        put_in_force(True, {name: "expandable_segments:False"})


def test_two_variables_that_differ_are_refused_with_the_one_that_would_win() -> None:
    environment = {OLD: "expandable_segments:True", NEW: "max_split_size_mb:64"}
    with pytest.raises(InputError, match=rf"would read {OLD} and ignore the other; unset one of them"):
        put_in_force(True, environment)


def test_two_variables_that_say_the_same_are_no_contradiction() -> None:
    environment = {OLD: "expandable_segments:True", NEW: " expandable_segments:True"}
    put_in_force(True, environment)
    assert environment[OLD] == "expandable_segments:True"


def test_a_second_run_of_the_program_is_not_bound_by_what_the_first_one_set() -> None:
    """A series hands its environment to child processes of other strategies."""
    environment: dict[str, str] = {}
    put_in_force(True, environment)
    put_in_force(False, environment)
    assert environment[OLD] == environment[NEW] == "expandable_segments:False"


def test_a_plan_refuses_settings_that_it_does_not_know_and_says_which() -> None:
    with pytest.raises(InputError, match=r"sets garbage_collection_threshold, which a plan does not know"):
        check_plain({NEW: "expandable_segments:True,garbage_collection_threshold:0.8"})
    check_plain({NEW: "expandable_segments:True"})
    check_plain({})


def test_lists_inside_brackets_are_one_option() -> None:
    text = "roundup_power2_divisions:[256:1,512:2,>:4],expandable_segments:True"
    assert options_of(text) == {"roundup_power2_divisions": "[256:1,512:2,>:4]", "expandable_segments": "True"}


def test_what_is_no_list_of_options_is_one_sentence() -> None:
    with pytest.raises(InputError, match="are not a list like"):
        put_in_force(True, {OLD: "expandable"})
