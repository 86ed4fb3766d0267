"""memory_events.json: valid JSON after every event, whatever the metadata, the disk and the program around it do."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from wanvram.errors import OutputError
from wanvram.recorder import event_file
from wanvram.recorder.events import EventLog
from wanvram.spans import Memory
from wanvram.strict_json import strict_json

MIB = 2**20
ONE = Memory(1, 1, None)


def names(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(path.read_text(encoding="utf-8"))]


def test_an_event_has_the_text_of_the_specification_and_the_exact_bytes(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.json") as log:
        first = log.log("dit", Memory(5 * MIB + 7, 6 * MIB, 9 * MIB), {"base_memory": MIB})
        second = log.log("forward", Memory(5 * MIB, 6 * MIB, None))
    assert first["memory_log"] == "dit: incremental_memory=4.00 MB"
    assert second["memory_log"] == "forward: peak_memory=5.00 MB"
    assert json.loads((tmp_path / "e.json").read_text()) == [first, second]
    assert list(first)[:4] == ["name", "timestamp", "memory_log", "metadata"]
    assert (first["allocated_bytes"], first["reserved_bytes"], first["device_bytes"]) == (5 * MIB + 7, 6 * MIB, 9 * MIB)
    assert abs(first["timestamp"] - time.time()) < 60


def test_the_file_is_a_list_before_the_first_event_and_after_each(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    with EventLog(path) as log:
        assert json.loads(path.read_text()) == []
        for count in range(1, 200):
            log.log("步骤", Memory(count, 0, None), {"pad": "x" * count})
            assert len(json.loads(path.read_text(encoding="utf-8"))) == count


def test_a_killed_process_leaves_every_event_it_had_logged(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    code = (
        "import sys; from pathlib import Path; from wanvram.record import Memory; "
        "from wanvram.recorder.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "for i in range(10**9):\n    log.log(f'event {i}', Memory(i, i, None), {'pad': 'x' * int(sys.argv[2])});"
        " print(i, flush=True)"
    )
    for wait, length in ((1, 1), (40, 1), (300, 1), (2000, 1), (100, 3000), (3, 20_000), (9, 20_000), (30, 20_000)):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(length)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(wait):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        logged = wait + len(rest.split("\n")) - 1
        events = json.loads(path.read_text())
        assert len(events) >= logged, "an event that was logged is lost"
        assert [event["allocated_bytes"] for event in events] == list(range(len(events)))


def test_a_disk_that_takes_half_an_event_leaves_a_valid_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.json"
    real = os.pwrite
    log = EventLog(path)
    log.log("kept", Memory(1, 1, None))
    full = [True]

    def half(file: int, data: bytes, offset: int) -> int:
        return real(file, data[: len(data) // 2] if len(data) > 2 and full[0] else data, offset)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(OutputError, match=r"e\.json: No space left"):
        log.log("lost", Memory(2, 2, None))
    assert [event["name"] for event in json.loads(path.read_text())] == ["kept"]
    full[0] = False
    log.log("later", Memory(3, 3, None))
    log.close()
    assert [event["name"] for event in json.loads(path.read_text())] == ["kept", "later"]


def test_a_full_disk_while_the_file_is_replaced_leaves_the_old_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "e.json"
    log = EventLog(path)
    log.log("kept", Memory(1, 1, None))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match="No space left"):
            log.log("lost", Memory(2, 2, None), {"pad": "x" * 5000})
    assert os.listdir(tmp_path) == ["e.json"]
    log.log("later", Memory(3, 3, None), {"pad": "x" * 5000})
    log.close()
    assert [event["name"] for event in json.loads(path.read_text())] == ["kept", "later"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"shape": torch.Size([1, 2]), "dtype": torch.float16},
        {("a", "tuple"): 1},
        {"loss": float("nan"), "deep": [{"x": float("inf")}, object()]},
        {"file": "\udcff"},
        {"tensor": torch.zeros(2)},
    ],
)
def test_any_metadata_can_be_logged_and_the_file_stays_strict_json(metadata: dict[Any, Any], tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with EventLog(tmp_path / "e.json") as log:
        log.log("x", Memory(1, 1, None), metadata)
        log.log("y", Memory(1, 1, None))
    events = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert [event["name"] for event in events] == ["x", "y"]
    assert len(events[0]["metadata"]) == len(metadata)


def test_a_cycle_in_the_metadata_is_cut_off(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {}
    metadata["self"] = metadata
    with EventLog(tmp_path / "e.json") as log:
        log.log("x", Memory(1, 1, None), metadata)
    assert len(json.loads((tmp_path / "e.json").read_text())) == 1


@pytest.mark.parametrize("base", [None, "much", float("nan"), 10**400, [1]])
def test_an_event_whose_base_memory_is_no_number_says_the_peak_with_a_warning(base: Any, tmp_path: Path) -> None:
    with (
        EventLog(tmp_path / "e.json") as log,
        pytest.warns(UserWarning, match="base_memory: .* is not a number of bytes"),
    ):
        log.log("x", Memory(MIB, 1, None), {"base_memory": base})
    (event,) = json.loads((tmp_path / "e.json").read_text())
    assert event["memory_log"] == "x: peak_memory=1.00 MB"


class Hostile(dict[str, Any]):
    """What metadata may be: nothing about it can be relied on."""

    def __str__(self) -> str:
        raise SystemExit("no text")

    __repr__ = __str__

    def __iter__(self) -> Any:
        raise ArithmeticError("no keys")

    items = keys = values = __contains__ = __iter__  # type: ignore[assignment]


class Silent:
    def __str__(self) -> str:
        raise BaseException("no text")


@pytest.mark.parametrize(
    ("metadata", "written"),
    [
        ({"a": 10**5000}, {"a": hex(10**5000)}),
        ({"a": -(10**5000), "b": 1}, {"a": hex(-(10**5000)), "b": 1}),
        ({"a": Silent()}, {"a": "<Silent>"}),
        ({"a": [Silent(), {"b": Silent()}]}, {"a": ["<Silent>", {"b": "<Silent>"}]}),
        (Silent(), "<Silent>"),
        (Hostile(a=1), "<Hostile>"),
        ({"a": Hostile(a=1)}, {"a": "<Hostile>"}),
        (5, 5),
        ("base_memory", "base_memory"),
        (["base_memory"], ["base_memory"]),
        (torch.ones(2), "tensor([1., 1.])"),
        (MappingProxyType({"step": 1}), {"step": 1}),
        ({"file": "\udcff", "b\ud800": 1}, {"file": "\\udcff", "b\\ud800": 1}),
        ({"a": b"\xff"}, {"a": "b'\\xff'"}),
        ({"a": {1, }}, {"a": "{1}"}),
        ({"a": float("nan"), "b": 1.5, 3: True, None: None}, {"a": "nan", "b": 1.5, "3": True, "None": None}),
    ],
)  # fmt: skip
def test_whatever_metadata_holds_an_event_is_written(metadata: Any, written: Any, tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.json") as log:
        event = log.log("x", Memory(1, 1, None), metadata)
    text = (tmp_path / "e.json").read_text(encoding="utf-8")
    assert strict_json(text) == [event]
    assert event["metadata"] == written


@pytest.mark.parametrize("depth", [50, 900, 5000, 200_000])
def test_metadata_nested_deeper_than_readers_go_is_cut_off_into_text(depth: int, tmp_path: Path) -> None:
    nested: Any = []
    for _ in range(depth):
        nested = [nested]
    with EventLog(tmp_path / "e.json") as log:
        log.log("x", Memory(1, 1, None), {"nested": nested, "kept": 1})
    text = (tmp_path / "e.json").read_text()
    assert json.loads(text)[0]["metadata"]["kept"] == 1
    assert text.count("[") < 100 or '[[[[[[[[[[[["' not in text
    while nested:  # a list of lists of lists frees itself by recursion
        nested = nested[0]


@pytest.mark.parametrize("name", ["\udcff", 5, None, Silent(), b"x"])
def test_the_name_of_an_event_may_be_anything(name: Any, tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.json") as log:
        log.log(name, Memory(1, 1, None))
    (event,) = strict_json((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert isinstance(event["name"], str)


def test_an_event_after_the_close_is_still_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e.json")
    log.log("a", Memory(1, 1, None))
    log.close()
    log.close()
    log.log("b", Memory(1, 1, None))
    log.close()
    assert [event["name"] for event in json.loads((tmp_path / "e.json").read_text())] == ["a", "b"]


def test_events_in_a_missing_folder_are_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        EventLog(tmp_path / "missing" / "e.json")


# --- the program around it --------------------------------------------------------------------------------------------


def test_events_of_any_length_are_kept_in_room_before_the_bracket_and_the_file_stays_a_list(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    copies = []
    with pytest.MonkeyPatch.context() as patch:
        real = event_file.ListFile._replace
        patch.setattr(event_file.ListFile, "_replace", lambda *a, **k: (copies.append(1), real(*a, **k))[1])
        with EventLog(path) as log:
            for count in range(1, 400):
                log.log("x", Memory(count, 0, None), {"pad": "x" * (count * 37 % 3900)})
                assert len(json.loads(path.read_text())) == count
    assert len(copies) < 40, "a copy for each page would be 200"
    assert [event["allocated_bytes"] for event in json.loads(path.read_text())] == list(range(1, 400))
    assert "     " not in path.read_text()[-100:], "closing gives the room back"


def test_a_list_beyond_the_largest_copy_takes_long_events_in_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_file, "LARGEST_COPY", 100_000)
    with EventLog(tmp_path / "e.json") as log:
        for count in range(100):
            log.log("x", Memory(count, 0, None), {"pad": "x" * 6000})
            assert len(json.loads((tmp_path / "e.json").read_text())) == count + 1


def test_eight_threads_lose_no_event(tmp_path: Path) -> None:
    def work(thread: int) -> None:
        for number in range(500):
            log.log(f"{thread}:{number}", ONE, {"pad": "x" * (number % 7 * 500)})
            if number % 50 == 0:
                log.close()

    with EventLog(tmp_path / "e.json") as log:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(names(tmp_path / "e.json")) == sorted(f"{t}:{n}" for t in range(8) for n in range(500))


def test_a_signal_s_handler_may_log_while_an_event_is_written(tmp_path: Path) -> None:
    logged = [0]

    def handler(*_: object) -> None:
        log.log("handler", ONE)
        logged[0] += 1

    log = EventLog(tmp_path / "e.json")
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        for number in range(1500):
            log.log(str(number), ONE)
        signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        log.close()
    found = names(tmp_path / "e.json")
    assert found.count("handler") == logged[0] > 0
    assert [name for name in found if name != "handler"] == [str(number) for number in range(1500)]


def test_an_exception_as_soon_as_a_copy_has_the_name_leaves_one_list_with_every_event_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TimeUp(Exception):
        pass

    replace, left = os.replace, [1]

    def replaced_and_interrupted(source: object, target: object) -> None:
        replace(source, target)  # type: ignore[call-overload]
        if left and left.pop():
            raise TimeUp

    with EventLog(tmp_path / "e.json") as log:
        log.log("first", Memory(1, 1, None))
        monkeypatch.setattr(event_file.os, "replace", replaced_and_interrupted)
        with pytest.raises(TimeUp):
            log.log("second", Memory(2, 1, None), {"pad": "x" * 5000})  # more than a page: the file is copied
        log.log("third", Memory(3, 1, None))
    assert names(tmp_path / "e.json") == ["first", "second", "third"]
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_an_exception_out_of_a_signal_s_handler_passes_and_the_list_goes_on(tmp_path: Path) -> None:
    class TimeUp(Exception):
        pass

    def handler(*_: object) -> None:
        raise TimeUp

    path = tmp_path / "e.json"
    log, whole, cut_off = EventLog(path), 0, 0
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for number in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-5 + number % 40 * 2e-6)
                log.log("x", Memory(number, 1, None), {"pad": "x" * (number % 5 * 900)})
                signal.setitimer(signal.ITIMER_REAL, 0)
                whole += 1
            except TimeUp:
                cut_off += 1
            json.loads(path.read_text())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        log.close()
    assert whole <= len(names(path)) <= whole + cut_off


def test_a_forked_process_has_a_file_of_its_own_or_none(tmp_path: Path) -> None:
    path = tmp_path / "memory_events.json"
    log = EventLog(path)
    log.log("before", ONE)
    for logs in (True, False, True):
        child = os.fork()
        if child == 0:
            with log:
                for number in range(300 if logs else 0):
                    log.log(f"child {number}", ONE)
            os._exit(0)
        for number in range(300):
            log.log(f"parent {number}", ONE)
        assert os.waitpid(child, 0)[1] == 0
    log.close()
    assert names(path) == ["before"] + [f"parent {number}" for number in range(300)] * 3
    assert sorted(os.listdir(tmp_path)) == ["memory_events-2.json", "memory_events-3.json", "memory_events.json"]
    for number in (2, 3):
        assert names(tmp_path / f"memory_events-{number}.json") == [f"child {number}" for number in range(300)]


def test_a_process_forked_while_another_thread_writes_does_not_hang(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading; from pathlib import Path; from wanvram.record import Memory\n"
        "from wanvram.recorder.events import EventLog\n"
        "log, going = EventLog(Path(sys.argv[1])), [True]\n"
        "def work():\n"
        "    while going[0]: log.log('thread', Memory(1, 1, None), {'pad': 'x' * 2000})\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[t.start() for t in threads]\n"
        "for i in range(20):\n"
        "    if (pid := os.fork()) == 0:\n"
        "        log.log('child', Memory(1, 1, None)); log.close(); os._exit(0)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "going[0] = False; [t.join() for t in threads]; log.close()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "e.json")], check=True, timeout=60)
    assert set(names(tmp_path / "e.json")) == {"thread"}
    assert all(names(tmp_path / f"e-{number}.json") == ["child"] for number in range(2, 22))


def test_a_program_that_closes_all_descriptors_keeps_its_own_files(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from wanvram.record import Memory\n"
        "from wanvram.recorder.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1])); log.log('before', Memory(1, 1, None))\n"
        "os.closerange(3, 100)\n"
        "mine = [open(f'{sys.argv[1]}.mine{i}', 'w+b') for i in range(20)]\n"
        "log.log('after', Memory(1, 1, None)); log.close(); log.log('late', Memory(1, 1, None)); log.close()\n"
        "[(file.write(b'mine'), file.close()) for file in mine]\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "e.json")], check=True, timeout=60)
    assert names(tmp_path / "e.json") == ["before", "after", "late"]
    assert {path.read_bytes() for path in tmp_path.glob("*.mine*")} == {b"mine"}


def test_a_program_may_change_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with EventLog(Path("e.json")) as log:
        monkeypatch.chdir("elsewhere")
        for number in range(50):
            log.log("x", Memory(number, 1, None), {"pad": "x" * 300})
    assert len(names(tmp_path / "e.json")) == 50
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("closed", [False, True])
def test_a_file_that_was_removed_comes_back_with_its_events_and_another_one_in_its_place_stays(
    closed: bool, tmp_path: Path
) -> None:
    path = tmp_path / "e.json"
    log = EventLog(path)
    log.log("a", ONE)
    if closed:
        log.close()
    path.unlink()
    log.log("b", ONE)
    assert names(path) == (["b"] if closed else ["a", "b"])
    path.unlink()
    path.write_text("mine")
    log.log("c", ONE)
    log.close()
    assert path.read_text() == "mine"
    assert log.path == tmp_path / "e-2.json"
    assert names(log.path) == (["b", "c"] if closed else ["a", "b", "c"])


def test_a_log_that_keeps_what_exists_takes_the_next_free_number(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.symlink_to(tmp_path / "nowhere")
    for number in range(1, 4):
        with EventLog(path, keep_existing=True) as log:
            log.log(str(number), ONE)
        assert log.path == tmp_path / f"e-{number + 1}.json"
    assert [names(tmp_path / f"e-{number}.json") for number in (2, 3, 4)] == [["1"], ["2"], ["3"]]
    assert sorted(os.listdir(tmp_path)) == ["e-2.json", "e-3.json", "e-4.json", "e.json"]


def test_a_file_system_without_hard_links_numbers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        with EventLog(tmp_path / "e.json", keep_existing=True) as log:
            log.log("x", ONE)
    assert sorted(os.listdir(tmp_path)) == ["e-2.json", "e.json"]
