"""Lanes compute groups in any order and commit them in theirs."""

import os
import threading
import time

import pytest
import torch

from cce_inductor.kernels.blockwise import lanes

THREADS = 4


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


class Recorder:
    """A lane that waits longest in the first groups, so that later ones are ready first."""

    def __init__(self, committed, fails_at=None):
        self.committed, self.fails_at = committed, fails_at

    def compute(self, group):
        time.sleep(0.02 if group % 3 == 0 else 0.0)
        self.group = group
        self.thread = threading.current_thread()
        if group == self.fails_at:
            raise IndexError("index 7 is out of bounds")
        assert not torch.is_grad_enabled() or self.thread is threading.main_thread()

    def commit(self):
        self.committed.append((self.group, self.thread, torch.get_num_threads()))


def committed(count, groups, **options):
    made = []
    lanes.run([Recorder(made, **options) for _ in range(count)], groups)
    return made


@pytest.mark.parametrize("count", [1, 2, 3])
def test_commits_are_in_order(count, threads):
    made = committed(count, 20)
    assert [group for group, _, _ in made] == list(range(20))
    assert len({thread for _, thread, _ in made}) <= count


def test_threads_of_pytorch_are_divided_among_the_lanes(threads):
    assert {number for *_, number in committed(2, 20)} == {THREADS // 2}
    assert {number for *_, number in committed(1, 20)} == {THREADS}
    numbers = []
    other = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert numbers == [torch.get_num_threads()] == [THREADS]


def test_an_error_reaches_the_caller(threads):
    with pytest.raises(IndexError, match="out of bounds"):
        committed(3, 20, fails_at=7)
    assert len(committed(3, 20)) == 20  # the threads go on


def test_inference_mode(threads):
    """What the caller allocated in inference mode can be changed in place only there."""
    total = []

    class Lane(Recorder):
        def commit(self):
            assert torch.is_inference_mode_enabled() == total[0].is_inference()
            total[0].add_(self.group)

    for enabled in (True, False):
        with torch.inference_mode(enabled):
            total[:] = [torch.zeros(())]
            lanes.run([Lane([]) for _ in range(2)], 6)
        assert total[0].item() == 15


def test_several_callers_share_the_threads(threads):
    made = [None] * 6

    def call(number):
        made[number] = [group for group, _, _ in committed(2, 9)]

    callers = [threading.Thread(target=call, args=[number]) for number in range(len(made))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert made == [list(range(9))] * len(made)


def in_new_thread(function, *arguments):
    made = []
    thread = threading.Thread(target=lambda: made.append(function(*arguments)))
    thread.start()
    thread.join()
    return made[0]


def test_the_number_of_threads_stays_as_it_is(threads):
    """Both that of the caller, and the one with which new threads begin."""
    in_new_thread(torch.set_num_threads, THREADS - 1)
    assert in_new_thread(torch.get_num_threads) == THREADS - 1
    lanes._new_pool.cache_clear()
    committed(2, 4)
    assert in_new_thread(torch.get_num_threads) == THREADS - 1
    assert torch.get_num_threads() == THREADS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_process_has_lanes_of_its_own(threads):
    committed(2, 4)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(len(committed(2, 4))).encode())
        os._exit(0)
    os.close(write)
    assert os.read(read, 10) == b"4"
    os.waitpid(child, 0)


def test_lane_count(threads):
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert lanes.lane_count(cpu, groups=100, lane_bytes=1, most_bytes=100) == lanes.MOST
    assert lanes.lane_count(cpu, groups=3, lane_bytes=1, most_bytes=100) == 3
    assert lanes.lane_count(cpu, groups=100, lane_bytes=50, most_bytes=100) == 2
    assert lanes.lane_count(cpu, groups=100, lane_bytes=500, most_bytes=100) == 1
    assert lanes.lane_count(cpu, groups=0, lane_bytes=0, most_bytes=100) == 1
    assert lanes.lane_count(meta, groups=100, lane_bytes=1, most_bytes=100) == 1
