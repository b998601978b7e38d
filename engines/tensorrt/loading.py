"""Copy an engine's weights to the device. Those that are put together of a checkpoint's bytes go through one buffer of host memory, so a
weight of gigabytes takes no more of it than that; pages of the checkpoint's files are let go of weight by weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engines.pieces import STAGING_BYTES
from engines.weights import StoredWeight


def load_weights(
    device: Any, weights: Sequence[StoredWeight], tick: Callable[[], None] = lambda: None, staging: int = STAGING_BYTES
) -> dict[str, int]:
    """Device addresses of new memory that holds the weights, by name.

    Args:
        device: `engines.tensorrt.device.CudaDevice` or one that does the same.
        tick: called whenever there is progress.
        staging: most bytes of a copy, and of the buffer.
    """
    buffer = np.empty(min(staging, max((weight.nbytes for weight in weights), default=0)), np.uint8)
    addresses = {}
    for weight in weights:
        addresses[weight.record.name] = address = int(device.allocate(weight.nbytes))
        for block in weight.blocks(buffer):
            device.upload(address, block)
            address += len(block)
            tick()
        weight.forget()
    return addresses
