"""Stop strings over streamed text: nothing that may still become a stop string is released."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches the text of one sequence. How it is cut into pieces (tokens) changes neither what is shown nor matched."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Add text; returns what may be shown now. After a match (`matched`), returns nothing more.

        The match that ends first wins, as it would if the text came character by character; of two that end together
        the longer one. Text from the match on is dropped.
        """
        if self.matched is not None:
            return ""
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if ends:
            _, start, self.matched = min(ends)
            self._held = ""
            return text[:start]
        held = self._forming(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text still held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _forming(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
