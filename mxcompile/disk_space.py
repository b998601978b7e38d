"""How many bytes of weights a build will write, told before it spends minutes on what the disk has no room for."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mxcompile.errors import EnvironmentProblem

if TYPE_CHECKING:
    from export.parallel.plan import ShardingPlan
    from model_defs.checkpoint.reader import Checkpoint

_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def written_weights(
    plan: ShardingPlan, checkpoint: Checkpoint, dtype: str, *, strip_weights: bool, quantize_experts: str | None
) -> int:
    """Bytes of weights that all ranks of a TensorRT engine have on the disk.

    With `strip_weights` those are the quantized ones and those of another type than the checkpoint's; without, all of them. Raises
    CheckpointError where a tensor is missing.
    """
    import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
    import numpy as np

    from model_defs.checkpoint.verify import require_complete
    from model_defs.weights import Direct, weight_recipes

    require_complete(checkpoint, plan.config)
    itemsize, total = np.dtype(dtype).itemsize, 0
    for name, recipe in weight_recipes(plan.config).items():
        held = plan.held_shape(name)
        if quantize_experts is not None and not isinstance(recipe, Direct):
            total += math.prod(held) + 4 * math.prod(held[:2])  # int8, and an fp32 scale per row
        elif not strip_weights or any(_STORED.get(checkpoint.entries[t].dtype) != dtype for t in recipe.tensors):
            total += itemsize * math.prod(held)
    return total * plan.mapping.tp_size


def check_space(needed: int, output: Path, hint: str) -> None:
    """EnvironmentProblem (exit code 3) where the disk of `output` has less than `needed` bytes left."""
    folder = output.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = free_bytes(folder)
    if needed > free:
        raise EnvironmentProblem(
            f"{output}: the engine's weights need {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left; {hint}"
        )


def free_bytes(folder: Path) -> int:
    """That are left on the disk of a folder."""
    return shutil.disk_usage(folder).free
