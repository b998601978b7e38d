"""What a TensorRT session says of its device's memory, on a device of host memory, and what a benchmark makes of it."""

from __future__ import annotations

import gc

import pytest
from host_device import HostDevice
from test_trt_session import BATCH, CHUNK, Made

from engines.tensorrt.books import Books
from mxcompile.bench.statistics import summary
from mxcompile.bench.worker import measure

TOTAL = 1 << 30


class CountedDevice(HostDevice):
    """Says like a GPU what is free; some of it is taken by another process."""

    others = 1 << 20

    def free_memory(self) -> tuple[int, int]:
        return TOTAL - self.others - sum(len(block) for block in self.blocks.values()), TOTAL


def test_books_follow_what_is_allocated_and_freed() -> None:
    books = Books(CountedDevice())
    first, second = books.allocate(1000), books.allocate(500)
    assert books.memory() == {"own": 1500, "own_peak": 1500, "used": 1500 + CountedDevice.others}
    books.free(first)
    assert books.memory(reset=True) == {"own": 500, "own_peak": 1500, "used": 500 + CountedDevice.others}
    assert books.memory()["own_peak"] == 500
    books.free(second)
    assert books.memory()["own"] == 0
    assert Books(HostDevice()).memory()["used"] is None


def test_a_session_knows_what_it_holds() -> None:
    made = Made(strip=True)
    held = sum(len(block) for block in made.device.blocks.values())
    assert made.session.device_memory()["own"] == held
    assert held > sum(parameter.nbytes for parameter in made.model.parameters())
    state = made.session.new_state(BATCH)
    assert made.session.device_memory()["own"] == held + state.nbytes
    del state
    gc.collect()
    found = made.session.device_memory()
    assert (found["own"], found["used"]) == (held, None)
    assert found["own_peak"] > held


def test_a_benchmark_records_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_trt_session.HostDevice", CountedDevice)
    made = Made()
    task = {"prompt_length": CHUNK, "batch_size": 2, "new_tokens": 2, "seed": 0}
    held = made.session.device_memory()["own"]
    round_ = measure(made.session, task)
    assert round_["device_own_bytes"] == held + round_["state_bytes"]
    assert round_["device_peak_bytes"] == round_["device_own_bytes"] + CountedDevice.others
    found = summary([round_, round_ | {"device_peak_bytes": 7}], CHUNK, 2)
    assert found["device_peak_bytes"] == round_["device_peak_bytes"]
    assert found["device_own_bytes"] == round_["device_own_bytes"]
