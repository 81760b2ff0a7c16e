"""A rank that stands still, and those that wait for it: all say where, and who stopped first is said first."""

from __future__ import annotations

import ctypes
import json
import re
import time

import pytest

from esam_dist.data import TrainData
from esam_dist.ranks import Ranks
from esam_dist.watchdog import FOLDER, Watchdog, causes, innermost, watching
from tests.commands import TIMEOUT_SECONDS, on_ranks, wait_for

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)
SECONDS = 5.0


def stand_still_here(seconds: float) -> None:
    time.sleep(seconds)


def stall_rank_1(rank: int) -> None:
    """Its fourth batch does not come."""
    made = TrainData.batches

    def batches(self: TrainData, samples_seen: int) -> object:
        for number, batch in enumerate(made(self, samples_seen)):
            if rank == 1 and number == 3:
                stand_still_here(1.7 * SECONDS)
            yield batch

    TrainData.batches = batches


def test_the_rank_that_stalls_is_named_before_the_one_that_waits(tiny, tmp_path) -> None:
    keys = (f"engine.collective_timeout_seconds={SECONDS}", f"run.folder={tmp_path / 'run'}")
    answers = on_ranks("train", tiny, *keys, first=stall_rank_1)
    assert all(answer.status for answer in answers)
    stacks = {int(path.stem[5:]): path.read_text() for path in (tmp_path / "run" / FOLDER).iterdir()}
    assert sorted(stacks) == [0, 1]
    still = {rank: json.loads(text.partition("\n")[0]) for rank, text in stacks.items()}
    assert still[1]["since"] < still[0]["since"]
    assert all(0.8 * SECONDS <= entry["seconds"] < SECONDS for entry in still.values())
    assert "stand_still_here" in innermost(stacks[1])
    assert "Current thread" in stacks[1]
    for rank, answer in enumerate(answers):
        assert f"rank {rank} on " in answer.err
        assert 'File "' in answer.err.partition("its stacks, also in")[2]
    # The one that waited fails first, with an error of the network; the cause stands before it.
    err = answers[0].err
    first, then = err.index("stood still first: rank 1 on "), err.index("then: rank 0 on ")
    assert first < then < err.index("Timed out")
    assert re.search(
        r"stood still first: rank 1 .*behind (the update before|phase|update).* stand_still_here; its", err
    )
    assert [line.partition(":")[0] for line in causes(tmp_path / "run")] == ["stood still first", "then"]


def test_who_stopped_first_comes_first_whatever_failed_first_and_old_stacks_do_not_count(tmp_path) -> None:
    (tmp_path / FOLDER).mkdir()
    for rank, since in ((0, 30.0), (1, 10.0), (2, 20.0)):
        head = {"rank": rank, "host": "h", "pid": 7, "since": since, "seconds": 5.0, "last": "phase 'data'"}
        other = 'Thread 0x1 (most recent call first):\n  File "other.py", line 1 in x\n\n'
        own = (
            f'Thread 0x2 [a] (most recent call first):\n  File "a{rank}.py", line 3 in f\n  File "b.py", line 4 in g\n'
        )
        (tmp_path / FOLDER / f"rank_{rank:05d}.txt").write_text(json.dumps(head) + "\n" + other + own)
    (tmp_path / FOLDER / "rank_00003.txt").write_text("no JSON")
    lines = causes(tmp_path)
    assert [int(re.search(r"rank (\d)", line)[1]) for line in lines] == [1, 2, 0]
    assert "in a1.py:3 f; its stacks: " in lines[0]
    (tmp_path / FOLDER / "rank_00004.txt").write_text(json.dumps(head | {"rank": 4, "world_size": 6}) + "\n")
    assert causes(tmp_path)[0].startswith("no word from rank 3, 5: ")
    assert causes(tmp_path, time.time() + 60) == []
    assert causes(tmp_path / "nothing") == []


def test_signs_of_life_keep_it_quiet_and_a_rank_that_goes_on_says_so(tmp_path, caplog) -> None:
    with watching(tmp_path, Ranks(), 0.5) as dog:
        latest = [time.monotonic()]
        dog.signs.append(lambda: (latest[0], "update 1"))
        for _ in range(8):
            time.sleep(0.1)
            latest[0] = time.monotonic()
        assert not (tmp_path / FOLDER).exists()
        wait_for((tmp_path / FOLDER / "rank_00000.txt").exists)
        latest[0] = time.monotonic()
        wait_for(lambda: "rank 0 goes on" in caplog.text)
    assert "behind update 1" in caplog.text


def test_an_error_is_preceded_by_who_stood_still(tmp_path, caplog) -> None:
    def fail_late() -> None:
        with watching(tmp_path, Ranks(), 0.1):
            wait_for(lambda: causes(tmp_path))
            raise RuntimeError("Timed out")

    with pytest.raises(RuntimeError, match="Timed out"):
        fail_late()
    assert "stood still first: rank 0 on " in caplog.text


def hold_the_interpreter(rank: int) -> None:
    """Stand in C, for a while, without giving the interpreter back: no other Python thread runs."""
    if rank == 1:
        made = TrainData.batches

        def batches(self: TrainData, samples_seen: int) -> object:
            ctypes.PyDLL(None).sleep(int(2 * SECONDS))
            return made(self, samples_seen)

        TrainData.batches = batches


@pytest.mark.slow
def test_a_call_in_c_that_holds_the_interpreter_is_shown_too(tiny, tmp_path) -> None:
    keys = (f"engine.collective_timeout_seconds={SECONDS}", f"run.folder={tmp_path / 'run'}")
    answers = on_ranks("train", tiny, *keys, first=hold_the_interpreter)
    assert answers[0].status
    assert "Timeout (" in answers[1].err
    assert re.search(r"test_stalls.py\", line \d+ in batches", answers[1].err)


def test_a_folder_that_cannot_be_written_costs_the_file_only(tmp_path, caplog, capfd) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    dog = Watchdog(tmp_path, Ranks(3, 3, 4), 0.1)
    dog.start()
    wait_for(lambda: "stands still" in caplog.text)
    dog.stop()
    assert "rank 3 on " in caplog.text
