"""Random weights of the vision half, scaled so that every part of it has a visible effect (see `random_weights`).

The tower is pre-norm: projections see inputs of unit size, and each sub-layer adds about 1 to the residual. The projector gives out
vectors of the size of a token's embedding, so that image and text meet the text model alike.
"""

from __future__ import annotations

import math
import re

# Standard deviation of a vector, or output size of a matrix for an input of unit size, by the last part of the name.
_SIZES = {
    "class_embedding": 0.5,
    "position_embedding": 0.5,
    "image_newline": 0.02,
    "patch_embedding": 1.0,
    "q_proj": 1.4,
    "k_proj": 1.4,
    "v_proj": 1.0,
    "out_proj": 2.0,  # averaging over patches shrinks values to about one half
    "fc1": 1.5,
    "fc2": 1.2,  # GELU leaves inputs of size 1.5 at about 0.9
    "linear_1": 0.7,  # the un-normed stream behind some layers has size 2 to 3
    "linear_2": 0.02,
}
_BIAS = 0.1  # of the output of the matrix beside it


def is_vision(name: str) -> bool:
    """Whether a tensor, by its published name, belongs to the vision half."""
    return name == "image_newline" or name.startswith(("vision_tower.", "multi_modal_projector."))


def vision_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of the tensor's values; a norm's weights lie around 1."""
    match = re.search(r"([^.]+?)\.(weight|bias)$", name)
    part, kind = (match.group(1), match.group(2)) if match else (name.rpartition(".")[2], "vector")
    if "norm" in part:
        return float(kind == "weight"), _BIAS
    size = _SIZES[part]
    if kind == "bias":
        return 0.0, _BIAS * size
    return 0.0, size if kind == "vector" or part == "position_embedding" else size / math.sqrt(math.prod(shape[1:]))
