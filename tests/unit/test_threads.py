"""The number of threads: measured, left alone where the environment says it, and fewer only for a clear gain."""

import pytest
import torch

from gorgon.decode import threads
from gorgon.models.backbone import load_backbone


@pytest.fixture
def unsaid(monkeypatch):
    """A process whose environment does not say how many threads to use."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [({1: 9.0, 2: 10.0}, 2), ({1: 5.0, 2: 10.0}, 1), ({1: 9.0, 2: 5.0, 4: 7.0}, 2), ({1: 9.0, 2: 6.5, 4: 7.0}, 4)],
)
def test_fewer_threads_must_be_clearly_faster(times, chosen):
    assert threads.pick_threads(times) == chosen


def test_fewer_threads_are_used_and_told(unsaid, capsys):
    threads.use_measured({1: 9.0, 2: 10.0})
    assert torch.get_num_threads() == 2 and not capsys.readouterr().err
    threads.use_measured({1: 5.0, 2: 10.0})
    assert torch.get_num_threads() == 1
    told = capsys.readouterr().err
    assert "threads: 1 (5.0 ms) instead of 2 (10.0 ms)" in told and "tune again" in told


def test_every_number_is_timed_and_the_old_one_restored(unsaid):
    torch.set_num_threads(3)
    times = threads.measure_threads(load_backbone("embedded"))
    assert set(times) == {1, 2, 3} and all(ms > 0 for ms in times.values())
    assert torch.get_num_threads() == 3


def test_threads_are_set_within_the_machine(unsaid):
    for asked, used in ((2, 2), (9, 2), (0, 2), (1, 1)):
        threads.set_threads(asked)
        assert torch.get_num_threads() == used


def test_the_environments_word_holds(unsaid, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads.set_threads(2)
    assert torch.get_num_threads() == 1
    assert threads.measure_threads(load_backbone("embedded")) == {}
