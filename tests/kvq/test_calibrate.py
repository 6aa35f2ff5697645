"""Fits share the threads of a CPU: the same codebooks, one thread each, the process's own number afterwards."""

import pytest
import torch

from kernels.kmeans import kmeans
from kvq.calibrate import _each


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_fits_at_once_learn_what_fits_in_turn_learn():
    x = torch.randn(4, 2, 600, 16, generator=torch.Generator().manual_seed(0))

    def learn(job):
        threads[job] = torch.get_num_threads()
        found[job] = kmeans(x[job], 32, generator=torch.Generator().manual_seed(job)).entries

    found, threads = {}, {}
    _each(learn, [0, 1, 2, 3], torch.device("cpu"))
    assert set(threads.values()) == {1} and torch.get_num_threads() == 2
    at_once, found = found, {}
    for job in range(4):
        learn(job)
    assert all(torch.equal(at_once[job], found[job]) for job in range(4))


def test_an_error_in_a_fit_is_raised_and_threads_are_given_back():
    def fail(job):
        raise ValueError("no such entries")

    with pytest.raises(ValueError, match="no such entries"):
        _each(fail, [0, 1], torch.device("cpu"))
    assert torch.get_num_threads() == 2
