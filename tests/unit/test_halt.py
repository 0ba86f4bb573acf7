"""The halt files: kept, read in doubt as a halt, cleared by nobody but resume."""

import os
import stat

import msgspec
import pytest

from bot.halt import HaltFiles


class StepClock:
    def __init__(self) -> None:
        self.now = 0

    def wall_ns(self) -> int:
        self.now += 1
        return self.now

    mono_ns = wall_ns


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "halt"


def covering(files: HaltFiles, strategy: str = "sr", symbol: str = "BTC/USDT:USDT"):
    return files.covering(strategy=strategy, symbol=symbol)


def test_halt_with_no_folder_yet_is_none(folder):
    assert HaltFiles(folder).list() == [] and covering(HaltFiles(folder)) is None


def test_halt_of_all_covers_everything_and_survives_the_process(folder):
    HaltFiles(folder).set("all", who="anna", why="odd fills", clock=StepClock())
    halt = covering(HaltFiles(folder))
    assert (halt.scope, halt.who, halt.why, halt.time_ns) == ("all", "anna", "odd fills", 1)
    assert covering(HaltFiles(folder), "other", "ETH/USDT:USDT") == halt


def test_halt_is_on_the_disk_before_anybody_goes_on(folder, monkeypatch):
    # fsync itself cannot be seen in a test: what is asked of it, and when, can.
    steps, sync, replace = [], os.fsync, os.replace

    def noted_sync(handle):
        steps.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("replace"), replace(old, new)))
    HaltFiles(folder).set("all", who="anna", why="odd fills", clock=StepClock())
    assert steps == [str(folder / "all.part"), "replace", str(folder)]
    HaltFiles(folder).clear("all", clock=StepClock())
    assert steps[3:] == [str(folder)], "and a resume is over after a power cut too"


def test_halt_of_a_strategy_or_symbol_covers_only_that(folder):
    files, clock = HaltFiles(folder), StepClock()
    files.set("strategy:sr", who="a", why="b", clock=clock)
    files.set("symbol:ETH/USDT:USDT", who="a", why="b", clock=clock)
    assert covering(files).scope == "strategy:sr"
    assert covering(files, "other", "ETH/USDT:USDT").scope == "symbol:ETH/USDT:USDT"
    assert covering(files, "other", "BTC/USDT:USDT") is None
    assert covering(files, "s", "BTC/USDT:USDT") is None, "a name that begins alike is another name"


def test_halt_with_a_second_reason_keeps_the_first(folder):
    files, clock = HaltFiles(folder), StepClock()
    first = files.set("all", who="executor", why="books differ", clock=clock)
    assert files.set("all", who="executor", why="later", clock=clock) == first
    assert files.list() == [first]


def test_halt_by_another_names_both_so_that_nobody_ends_it_as_the_firsts_alone(folder):
    files, clock = HaltFiles(folder), StepClock()
    files.set("all", who="health", why="a loop", clock=clock)
    both = files.set("all", who="anna", why="odd", clock=clock)
    assert (both.who, both.why, both.time_ns) == ("health, anna", "a loop; anna: odd", 1)
    assert files.set("all", who="health", why="a loop again", clock=clock) == both
    assert files.list() == [both]


def test_halt_by_another_that_cannot_be_written_is_the_first_ones(folder, monkeypatch):
    files, clock = HaltFiles(folder), StepClock()
    first = files.set("all", who="health", why="a loop", clock=clock)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("bot.halt.write_synced", full)
    assert files.set("all", who="anna", why="odd", clock=clock) == first


@pytest.mark.parametrize("name", ["all.json", "symbol-X.json"])
def test_halt_beside_a_damaged_file_ends_with_it(folder, name):
    folder.mkdir()
    (folder / name).write_text("{")
    files, clock = HaltFiles(folder), StepClock()
    both = files.set("all", who="anna", why="odd", clock=clock)
    assert files.set("all", who="anna", why="odd", clock=clock) == both and "anna" in both.who
    files.clear("all", clock=StepClock())
    assert files.list() == []


def test_resume_with_its_time_noted_is_known_to_the_next_watcher(folder, monkeypatch):
    files, clock = HaltFiles(folder), StepClock()
    assert files.ended_ns("all") == 0
    for _ in range(2):
        files.set("all", who="a", why="b", clock=clock)
        files.clear("all", clock=clock)
        assert files.ended_ns("all") == clock.now and files.ended_ns("symbol:X") == 0
    files.set("all", who="a", why="b", clock=clock)
    monkeypatch.setattr(os, "utime", lambda *_args, **_named: os.stat(folder / "none"))
    files.clear("all", clock=clock)
    assert not files.list(), "what cannot be noted keeps nobody halted"


def test_resume_with_several_halts_ends_one(folder):
    files, clock = HaltFiles(folder), StepClock()
    files.set("symbol:BTC/USDT:USDT", who="a", why="b", clock=clock)
    halt = files.set("all", who="a", why="c", clock=clock)
    assert files.clear("all", clock=StepClock()) == halt
    assert [h.scope for h in files.list()] == ["symbol:BTC/USDT:USDT"]
    assert files.clear("all", clock=StepClock()) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"scope":"all"}'])
def test_halt_with_a_damaged_file_halts_all(folder, content):
    folder.mkdir()
    (folder / "symbol-X.json").write_bytes(content)
    halt = covering(HaltFiles(folder))
    assert halt.scope == "all" and "unreadable halt file" in halt.why and "symbol-X.json" in halt.why


def test_resume_with_a_damaged_file_sets_it_aside(folder):
    folder.mkdir()
    (folder / "symbol-X.json").write_bytes(b"{")
    files = HaltFiles(folder)
    assert files.clear("all", clock=StepClock()).who == "tradehost"
    assert files.list() == [] and (folder / "symbol-X.damaged").read_bytes() == b"{"
    files.set("symbol:X", who="a", why="b", clock=StepClock())
    assert covering(files, symbol="X").who == "a"


def test_halt_with_a_folder_that_cannot_be_listed_raises(folder):
    folder.write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        covering(HaltFiles(folder))


@pytest.mark.parametrize("broken", ["a file above", "a loop"])
def test_halt_with_a_folder_that_cannot_be_reached_is_not_read_as_none(folder, broken):
    if broken == "a loop":
        folder.symlink_to(folder)
    else:
        folder.parent.joinpath("file").write_bytes(b"")
        folder = folder.parent / "file" / "halt"
    with pytest.raises(OSError):
        covering(HaltFiles(folder))


def test_halt_with_a_folder_for_a_file_halts_all(folder):
    (folder / "all.json").mkdir(parents=True)
    assert covering(HaltFiles(folder)).scope == "all"


def test_halt_with_a_torn_write_left_behind_is_not_yet_a_halt(folder):
    folder.mkdir()
    (folder / "all.part").write_bytes(b'{"sco')
    assert HaltFiles(folder).list() == []
    HaltFiles(folder).set("all", who="a", why="b", clock=StepClock())
    assert covering(HaltFiles(folder)).who == "a"


def test_halts_with_their_times_are_listed_oldest_first(folder):
    files, clock = HaltFiles(folder), StepClock()
    for scope in ("symbol:B/C:C", "all", "strategy:a"):
        files.set(scope, who="a", why="b", clock=clock)
    assert [h.scope for h in files.list()] == ["symbol:B/C:C", "all", "strategy:a"]


def test_halt_file_with_its_name_reads_as_json_for_other_tools(folder):
    HaltFiles(folder).set("symbol:BTC/USDT:USDT", who="a", why="b", clock=StepClock())
    content = msgspec.json.decode((folder / "symbol-BTC_USDT_USDT.json").read_bytes())
    assert content == {"scope": "symbol:BTC/USDT:USDT", "who": "a", "why": "b", "time_ns": 1}


def test_halt_by_whoever_comes_first_leaves_a_folder_that_all_may_write(tmp_path, folder):
    tmp_path.chmod(0o2770)
    before = os.umask(0o022)
    try:
        HaltFiles(folder).set("all", who="root", why="first", clock=StepClock())
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2770


def test_halt_with_somebody_elses_torn_write_in_the_way_is_written(folder):
    folder.mkdir()
    (folder / "all.part").write_bytes(b"{")
    (folder / "all.part").chmod(0o400)
    os.link(folder / "all.part", folder / "torn")
    HaltFiles(folder).set("all", who="a", why="b", clock=StepClock())
    assert covering(HaltFiles(folder)).why == "b"
    assert (folder / "torn").read_bytes() == b"{"
