"""What a session holds on its device. TensorRT allocates the plan's weights and its scratch memory itself; those show in what the whole
device has in use, and not in the session's own books."""

from __future__ import annotations

from typing import Any


class Books:
    """A device (`engines.tensorrt.device.CudaDevice`, or one that does the same) that keeps account of `allocate` and `free`."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._sizes: dict[int, int] = {}
        self._own = self._peak = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def allocate(self, nbytes: int) -> int:
        """As the device's."""
        address = int(self._device.allocate(nbytes))
        self._sizes[address] = nbytes
        self._own += nbytes
        self._peak = max(self._peak, self._own)
        return address

    def free(self, address: int) -> None:
        """As the device's."""
        self._device.free(address)
        self._own -= self._sizes.pop(address)

    def memory(self, reset: bool = False) -> dict[str, int | None]:
        """Bytes: own (allocated through here now), own_peak (the most since the last reset), used (on the device by everybody; None where
        it cannot tell). `reset`: after this answer, the peak starts again from what is held now."""
        free_memory = getattr(self._device, "free_memory", None)
        used = None
        if free_memory is not None:
            free, total = free_memory()
            used = total - free
        found = {"own": self._own, "own_peak": self._peak, "used": used}
        if reset:
            self._peak = self._own
        return found
