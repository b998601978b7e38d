"""TensorRT engines of several ranks: what is built, what the lowered graphs compute together, what a session does with them."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_limits import LIMITS
from host_device import HostDevice, HostEngine
from lowered_graph import Evaluated, lowered_ranks, random_model, small_config
from reference_ops import on_ranks
from test_lowered_numerics import FP32_LIMIT, RATIO, STEPS, Torch, relative_rms
from test_trt_build import no_gpu

from engines.config import EngineConfig, Limits, RankFiles
from engines.contract import port, states
from engines.directory import read_config, verify_files
from engines.errors import EngineError
from engines.parallel.heads import of_rank
from engines.tensorrt.lowering import Attention
from engines.tensorrt.nccl import ID_BYTES, Communicator, UniqueId
from engines.tensorrt.runtime import check_gpu
from engines.tensorrt.session import TrtSession
from engines.weights import Manifest
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from model_defs.presets import preset
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.building import BuildSummary, build
from mxcompile.inspection import inspect

Engine = tuple[Path, BuildSummary]


@pytest.fixture(scope="session")
def two_ranks(tiny: Path, plugins_at_hand: Path) -> Engine:
    """bf16, heads and experts over two ranks, weights outside."""
    output = tiny.parent / "ranks"
    options = LIMITS | {"tp_size": 2, "moe_ep_size": 2, "strip_weights": True}
    return output, build(tiny, output, target="tensorrt-rtx", **options)


def test_every_rank_has_its_plan_and_its_weights(two_ranks: Engine) -> None:
    folder, _ = two_ranks
    config = read_config(folder)
    verify_files(folder, config, whole=True)
    assert [files.graph for files in config.ranks] == ["rank0.engine", "rank1.engine"]
    assert [files.weights for files in config.ranks] == ["rank0.weights.json", "rank1.weights.json"]
    assert (config.mapping.tp_size, config.mapping.moe_tp_size, config.mapping.moe_ep_size) == (2, 1, 2)
    assert {spec.role: spec.dims[1] for spec in config.states} == {"recurrent_state": 4, "key": 2, "value": 2}
    assert {spec.role: spec.dims[1] for spec in of_rank(config, 1).states} == {
        "recurrent_state": 2,
        "key": 1,
        "value": 1,
    }


def test_nothing_of_the_checkpoint_is_copied(two_ranks: Engine) -> None:
    """Experts and columns too are listed as bytes of the checkpoint; together they are all the weights that the ranks hold."""
    folder, _ = two_ranks
    plan = ShardingPlan(preset("tiny"), ParallelMapping.of(2, None, 2))
    for rank in range(2):
        manifest = Manifest.from_json((folder / f"rank{rank}.weights.json").read_text(), "list")
        shapes = {record.name: tuple(record.shape) for record in manifest.tensors if not manifest.is_written(record)}
        assert shapes == {name: plan.held_shape(name) for name in plan.shapes}
        written = sum(record.nbytes for record in manifest.tensors if manifest.is_written(record))
        assert written < 100_000  # constants of the graph
        assert read_config(folder).files[f"rank{rank}.weights.bin"].size < 2 * written + 10_000


def test_the_exchanges_stay_in_the_plan(two_ranks: Engine) -> None:
    """As many as the plan of the ranks says; TensorRT's parser would otherwise have folded or dropped some."""
    plan = ShardingPlan(preset("tiny"), ParallelMapping.of(2, None, 2))
    found = inspect(two_ranks[0])
    assert found["operators"]["dist_collective"] == sum(item.count for item in plan.collectives()) == 25
    assert found["plugins"] == {"LinearAttention": 7, "MoE": 8}


def test_an_unchanged_build_of_ranks_is_skipped(tiny: Path, two_ranks: Engine) -> None:
    options = LIMITS | {"tp_size": 2, "moe_ep_size": 2, "strip_weights": True}
    assert build(tiny, two_ranks[0], target="tensorrt-rtx", **options).skipped
    with pytest.raises(EngineError, match="--force"):
        build(tiny, two_ranks[0], target="tensorrt-rtx", **(options | {"moe_ep_size": 1}))


@no_gpu
def test_running_ranks_without_a_gpu_takes_one_line(two_ranks: Engine) -> None:
    command = [sys.executable, "-m", "mxcompile", "run", two_ranks[0], "--tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: this engine needs 2 NVIDIA GPUs of compute capability 8.9")
    assert done.stderr.count("\n") == 1


def test_too_few_gpus_are_told(two_ranks: Engine) -> None:
    with pytest.raises(EngineError, match=r"needs 2 NVIDIA GPUs .*; here is no GPU 1") as caught:
        check_gpu(read_config(two_ranks[0]), "no GPU 1")
    assert caught.value.exit_code == 3


def _run(graphs: list[Any], ids: list[np.ndarray]) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Valid logits of rank 0 by step, and every rank's states behind the last one. All ranks must have the same logits."""

    def one(rank: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        run = Evaluated.of(graphs[rank], batch=2)
        found = []
        for step, new in zip(ids, STEPS, strict=True):
            found.append(run.step(step, new)[np.arange(max(new)) < np.array(new)[:, None]])
        return found, list(run.states.values())

    results = on_ranks(len(graphs), one)
    for other, _ in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0][0], other, strict=True))
    return results[0][0], [found for _, found in results]


@pytest.mark.parametrize(
    ("sizes", "attention"), [((2, None, 2), "plugin"), ((2, None, None), "mask"), ((4, 2, 2), "plugin")]
)
def test_ranks_together_equal_pytorch_in_fp32(sizes: tuple[int, int | None, int | None], attention: Attention) -> None:
    config = small_config()
    theirs = Torch(config, "float32")
    random = np.random.default_rng(4)
    ids = [random.integers(0, config.vocab_size, (2, max(new))) for new in STEPS]
    found, rank_states = _run(
        lowered_ranks(config, "float32", theirs.model, attention, ParallelMapping.of(*sizes)), ids
    )
    for step, new, logits in zip(ids, STEPS, found, strict=True):
        valid = np.arange(max(new)) < np.array(new)[:, None]
        assert np.abs(logits - theirs.step(step, new)[valid]).max() < FP32_LIMIT
    first_heads = np.concatenate([held[0] for held in rank_states], axis=1)
    assert np.abs(first_heads - theirs.states[0].numpy()).max() < FP32_LIMIT


def test_ranks_in_bf16_are_as_near_as_one_rank_may_be() -> None:
    """The limits of one rank hold: exchanges add roundings of partial sums where one rank has one rounding of the whole."""
    config = small_config(num_local_experts=2)
    truth, theirs = Torch(config, "float32"), Torch(config, "bfloat16")
    random = np.random.default_rng(5)
    ids = [random.integers(0, config.vocab_size, (2, max(new))) for new in STEPS]
    found, _ = _run(lowered_ranks(config, "bfloat16", theirs.model, "mask", ParallelMapping.of(2, None, 2)), ids)
    wanted, near = [], []
    for step, new in zip(ids, STEPS, strict=True):
        valid = np.arange(max(new)) < np.array(new)[:, None]
        wanted.append(truth.step(step, new)[valid])
        near.append(theirs.step(step, new)[valid])
    right = np.concatenate(wanted)
    assert relative_rms(np.concatenate(found), right) < RATIO * relative_rms(np.concatenate(near), right)


class Seat:
    """Stands in for a communicator: the exchanges of on_ranks need none."""

    def __init__(self) -> None:
        self.joined = 0

    def capsule(self) -> Seat:
        self.joined += 1
        return self


def test_sessions_of_all_ranks_equal_pytorch() -> None:
    """Prefill in chunks and decode of TrtSession on two ranks, each on a device of its own, states of a rank's heads."""
    config, batch, chunk = small_config(), 2, 8
    model = random_model(config, "float32")
    graphs = lowered_ranks(config, "float32", model, "plugin", ParallelMapping.of(2, None, 2))
    reference = PyTorchSession(model, max_seq_len=30)
    theirs = reference.new_state(batch)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [20, 21]]
    wanted = [reference.prefill(prompts, theirs)] + [reference.decode([t, t + 9], theirs) for t in range(4)]

    def one(rank: int) -> tuple[list[np.ndarray], np.ndarray, Seat, HostDevice]:
        graph = graphs[rank]
        described = EngineConfig(
            mxcompile_version="test",
            target="tensorrt-rtx",
            model=config.to_dict(),
            dtype="float32",
            limits=Limits(batch, 30, chunk),
            inputs=[port(value) for value in graph.graph.inputs],
            outputs=[port(value) for value in graph.graph.outputs],
            states=list(states(graph.graph)),
            ranks=[RankFiles(rank, f"rank{rank}.engine")],
            options={"capacity": 32, "max_positions": chunk},
        )
        device, seat = HostDevice(), Seat()
        session = TrtSession(described, device, HostEngine(device, graph, batch, chunk, chunk), [], seat)
        state = session.new_state(batch)
        found = [session.prefill(prompts, state)] + [session.decode([t, t + 9], state) for t in range(4)]
        return found, state.recurrent(0), seat, device

    results = on_ranks(2, one)
    for found, _, seat, device in results:
        assert max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)) < FP32_LIMIT
        assert seat.joined == 2  # the contexts of both profiles
        assert device.launches == 0  # exchanges are not captured
    heads = np.concatenate([state for _, state, _, _ in results], axis=1)
    assert np.abs(heads - theirs.recurrent(0)).max() < FP32_LIMIT


class FakeNccl:
    """NCCL's three functions as a communicator calls them."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.asked, self.joined = status, 0, []
        self.ncclGetErrorString = lambda status: b"unhandled system error"

    def ncclGetUniqueId(self, pointer: Any) -> int:
        self.asked += 1
        ctypes.memset(pointer, 7, ID_BYTES)
        return self.status

    def ncclCommInitRank(self, handle: Any, ranks: ctypes.c_int, unique: UniqueId, rank: ctypes.c_int) -> int:
        handle._obj.value = 1234
        self.joined.append((ranks.value, bytes(unique.internal), rank.value))
        return self.status


def test_every_rank_joins_with_the_id_of_rank_0() -> None:
    library, handed = FakeNccl(), []

    def share(content: bytes) -> bytes:
        handed.append(content)
        return handed[0]

    made = [Communicator(rank, 2, share, library) for rank in range(2)]
    assert library.asked == 1
    assert library.joined == [(2, bytes([7]) * ID_BYTES, 0), (2, bytes([7]) * ID_BYTES, 1)]
    assert "ncclComm_t" in repr(made[0].capsule())


def test_what_nccl_says_reaches_the_user() -> None:
    with pytest.raises(EngineError, match="ncclGetUniqueId failed: unhandled system error") as caught:
        Communicator(0, 2, lambda content: content, FakeNccl(status=2))
    assert caught.value.exit_code == 3
