"""Every way in which tensors can be wrong is reported under the tensor's name."""

import dataclasses

import numpy as np
import pytest
from checkpoint_helpers import MICRO, load_all, rewrite

from model_defs.checkpoint.reader import Checkpoint
from model_defs.checkpoint.verify import require_complete, verify
from model_defs.errors import CheckpointError

NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.2.block_sparse_moe.experts.1.w2.weight"


def problems(folder, **options) -> list[tuple[str, str]]:
    return [(problem.kind, problem.subject) for problem in verify(Checkpoint.open(folder), **options).problems]


def test_a_sound_checkpoint_has_no_problems(micro):
    seen = []
    report = verify(Checkpoint.open(micro), on_progress=lambda *step: seen.append(step), scan_values=True)
    assert report.ok
    assert report.tensors_checked == len(seen) == len(load_all(micro))
    total = Checkpoint.open(micro).total_bytes
    assert seen[-1][:2] == (total, total)
    assert report.bytes_scanned == total


def test_missing(micro):
    tensors = load_all(micro)
    del tensors[NORM], tensors[EXPERT]
    rewrite(micro, tensors)
    assert problems(micro) == [("missing", NORM), ("missing", EXPERT)]


def test_unexpected(micro):
    tensors = load_all(micro)
    extra = ["model.layers.0.shared_mlp.w1.weight", "model.layers.3.input_layernorm.weight", "vision_tower.x"]
    rewrite(micro, tensors | {name: np.ones(3, np.float32) for name in extra})
    assert sorted(problems(micro)) == [("unexpected", name) for name in sorted(extra)]
    with pytest.raises(CheckpointError, match="shared_mlp"):
        require_complete(Checkpoint.open(micro), MICRO)


def test_misshapen(micro):
    tensors = load_all(micro)
    tensors[EXPERT] = tensors[EXPERT].T.copy()
    tensors[NORM] = tensors[NORM][:-1].copy()
    rewrite(micro, tensors)
    assert problems(micro) == [("shape", NORM), ("shape", EXPERT)]
    message = str(verify(Checkpoint.open(micro)).problems[1])
    assert EXPERT in message
    assert "[16, 32]" in message
    assert "[32, 16]" in message


def test_wrong_type(micro):
    tensors = load_all(micro)
    tensors[EXPERT] = tensors[EXPERT].astype(np.int8)
    rewrite(micro, tensors)
    assert problems(micro) == [("dtype", EXPERT)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(micro, dtype, value):
    tensors = load_all(micro)
    broken = tensors[EXPERT].astype(dtype)
    broken[3, 5] = value
    rewrite(micro, tensors | {EXPERT: broken})
    assert problems(micro) == []
    assert problems(micro, scan_values=True) == [("values", EXPERT)]


def test_large_finite_values_pass_the_scan(micro):
    tensors = load_all(micro)
    tensors[EXPERT][0] = np.finfo(np.float32).max
    rewrite(micro, tensors)
    assert problems(micro, scan_values=True) == []


def test_a_hole_in_a_download_is_found(micro):
    tensors = load_all(micro)
    tensors[EXPERT][:] = 0
    rewrite(micro, tensors)
    assert problems(micro, scan_values=True) == [("values", EXPERT)]


def test_a_truncated_model_needs_its_first_layers_only(micro):
    tensors = load_all(micro)
    rewrite(micro, {name: value for name, value in tensors.items() if not name.startswith("model.layers.2.")})
    checkpoint = Checkpoint.open(micro)
    require_complete(checkpoint, MICRO.truncated(2))
    assert verify(checkpoint, config=MICRO.truncated(2)).ok
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..* is missing"):
        require_complete(checkpoint, MICRO)


def test_layers_beyond_the_cut_are_not_unexpected(micro):
    require_complete(Checkpoint.open(micro), MICRO.truncated(1))


def test_require_complete_names_the_first_and_counts_all(micro):
    wider = dataclasses.replace(MICRO, intermediate_size=18)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight .* and 24 more problems") as caught:
        require_complete(Checkpoint.open(micro), wider)  # 3 layers x 3 experts x 3 matrices
    assert caught.value.exit_code == 2
