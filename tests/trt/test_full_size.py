"""A checkpoint of MiniMax-Text-01's real size whose weights are holes: what is done with names, shapes and places of 912 GB."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from test_weights_at_load import placed, rank_model

from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from model_defs.checkpoint.create import create_checkpoint
from model_defs.checkpoint.reader import Checkpoint
from model_defs.presets import preset
from mxcompile.building import build
from mxcompile.checkpoints import verify_checkpoint
from mxcompile.disk_space import written_weights
from mxcompile.errors import EnvironmentProblem
from mxcompile.inspection import inspect

BYTES = 912_179_310_592  # 456 billion parameters in bf16
RANKS = ParallelMapping.of(8, None, 8)


@pytest.fixture(scope="module")
def text01(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("full-size") / "text-01"
    made = create_checkpoint(preset("text-01"), folder, hollow=True, with_tokenizer=False)
    if sum(512 * file.stat().st_blocks for file in made.files) > BYTES // 100:
        pytest.skip("this file system does not leave holes out")
    return made


def test_it_is_sound_and_described(text01: Checkpoint) -> None:
    report = verify_checkpoint(text01.folder)
    assert (report.ok, report.tensors_checked) == (True, 8243)
    found = inspect(text01.folder)
    assert found["total_bytes"] == BYTES
    assert found["stored_types"] == {"BF16": 8243}
    assert found["fingerprint"] == text01.fingerprint()


def test_a_rank_lists_its_weights_and_copies_none(text01: Checkpoint, tmp_path: Path) -> None:
    plan = ShardingPlan(text01.config, RANKS)
    manifest = placed(rank_model(plan, 3, text01, "bfloat16"), text01, tmp_path / "rank3", assembled=True)
    assert not any(manifest.is_written(record) for record in manifest.tensors)
    listed = sum(record.nbytes for record in manifest.tensors)
    assert listed == 2 * sum(math.prod(plan.held_shape(name)) for name in plan.shapes)
    assert listed == pytest.approx(BYTES / 8, rel=0.001)
    assert len(manifest.to_json()) < 1_000_000
    # Four experts of 9216 gate and 9216 up rows, each pair of matrices a piece.
    record = next(record for record in manifest.tensors if record.name == "layers.79.block_sparse_moe.fc1.weight")
    assert [(len(p.strands), p.width, p.times) for p in record.pieces] == [(2, 2 * 6144, 9216)] * 4
    first = text01.entries["model.layers.79.block_sparse_moe.experts.12.w1.weight"]
    assert manifest.files[record.pieces[0].strands[0].file].name == first.file.name
    assert record.pieces[0].strands[0].offset == first.offset


@pytest.mark.parametrize(
    ("strip", "dtype", "quantize", "needed"),
    [
        (True, "bfloat16", None, 0),
        (True, "bfloat16", "int8", 435e9),  # 32 x 3 x 9216 x 6144 weights of 80 layers, and a scale per row
        (True, "float16", None, 912e9),
        (False, "bfloat16", None, 912e9),
    ],
)
def test_what_a_build_writes_is_known_before(
    text01: Checkpoint, strip: bool, dtype: str, quantize: str | None, needed: float
) -> None:
    plan = ShardingPlan(text01.config, RANKS)
    found = written_weights(plan, text01, dtype, strip_weights=strip, quantize_experts=quantize)
    assert found == pytest.approx(needed, rel=0.001)


@pytest.mark.usefixtures("trt")
def test_a_build_that_the_disk_has_no_room_for_is_refused_at_once(
    text01: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxcompile.disk_space.free_bytes", lambda folder: 200_000_000_000)
    with pytest.raises(EnvironmentProblem, match=r"need 435\.12 GB, the disk has 200\.00 GB left") as caught:
        build(
            text01.folder,
            tmp_path / "engine",
            target="tensorrt-rtx",
            gpu="rtx-4090",
            strip_weights=True,
            quantize_experts="int8",
            tp_size=8,
            moe_ep_size=8,
        )
    assert caught.value.exit_code == 3
    assert not (tmp_path / "engine").exists()


def test_mapping_every_shard_leaves_as_many_files_to_open_as_before(text01: Checkpoint) -> None:
    """In a process of its own, whose limit is below the number of shards."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 2000))\n"
        "from model_defs.checkpoint.reader import Checkpoint\n"
        "opened = Checkpoint.open(sys.argv[1])\n"
        "assert {opened.array(name).nbytes for name in opened.entries}\n"
        "print(len(opened.files), len([open(sys.argv[1] + '/config.json') for _ in range(40)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, text01.folder], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(len(text01.files)), "40"], done.stderr
    assert len(text01.files) > 200


def test_loading_gives_the_memory_of_files_back(text01: Checkpoint) -> None:
    """Eight weights of 256 MiB, runs and alternating rows of a shard, in a process that holds one of them at a time."""
    script = (
        "import re, sys; from pathlib import Path; import numpy as np\n"
        "from engines.pieces import Piece, Strand; from engines.weights import StoredWeight, WeightRecord\n"
        "from engines.tensorrt.loading import load_weights\n"
        "class Device:\n"
        "    given = 0\n"
        "    def allocate(self, nbytes): return 0\n"
        "    def upload(self, address, block): self.given += len(block)\n"
        "n = 1 << 28; files = [np.memmap(sys.argv[1], np.uint8, 'r')]\n"
        "half = n // 2 // 12288 * 12288\n"
        "def piece(i):\n"
        "    woven = Strand(0, i * n, 12288), Strand(0, i * n + half, 12288)\n"
        "    return Piece(woven, 12288, half // 12288) if i % 2 else Piece.run(0, i * n, n)\n"
        "records = [WeightRecord(str(i), 'int8', [p.nbytes], p.nbytes, (p,)) for i, p in enumerate(map(piece, range(8)))]\n"
        "device = Device(); load_weights(device, [StoredWeight(r, files) for r in records])\n"
        # Not ru_maxrss: a new process starts with its parent's there.
        "most = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]\n"
        "print(device.given >> 20, int(most) >> 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, text01.files[1]], capture_output=True, text=True, check=False)
    given, most = map(int, done.stdout.split())
    assert given >= 2047, done.stderr
    assert most < 600  # MiB: 256 of one weight, 64 of the buffer, and what Python takes


def test_hundreds_of_shards_take_one_line(text01: Checkpoint) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mxcompile", "inspect", text01.folder], capture_output=True, text=True, check=True
    )
    count = len(text01.files)
    assert f"model-00001-of-{count:05d}.safetensors to model-{count:05d}-of-{count:05d}.safetensors, {count} files" in (
        " ".join(done.stdout.split())
    )
    assert done.stdout.count(".safetensors") == 2
