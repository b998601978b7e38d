"""Waiting requests, fair between clients.

The next request is the oldest one of the client that was served least, counted in tokens: the virtual token counter of
Sheng et al. 2024, "Fairness in Serving Large Language Models", algorithm 2, with a weight of 1 for prompt and output
tokens alike. A client that was away does not collect a claim: when it comes back it starts at the level of the least
served client that is there. So a client with a hundred waiting requests delays another's first one by at most the
request that is about to end.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

_REMEMBERED = 10_000  # clients whose service is remembered while they have no request here


class _Waiting(Protocol):
    @property
    def client(self) -> str: ...


Item = TypeVar("Item", bound=_Waiting)


class FairQueue(Generic[Item]):
    """Not thread-safe: its owner holds a lock around every call."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()  # no empty ones; oldest newcomer first
        self._running: Counter[str] = Counter()
        self._served: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def __iter__(self) -> Iterator[Item]:
        return (item for queue in self._waiting.values() for item in queue)

    def waiting_of(self, client: str) -> int:
        """Requests of `client` that wait."""
        return len(self._waiting.get(client, ()))

    def served(self, client: str) -> int:
        """Tokens on the account of `client`, on a scale that only differences have a meaning on."""
        return self._served.get(client, 0)

    def push(self, item: Item, *, first: bool = False) -> None:
        """Add a request behind those of its client, or with `first` before them."""
        client = item.client
        if client not in self._waiting and not self._running[client]:
            self._arrive(client)
        queue = self._waiting.setdefault(client, deque())
        if first:
            queue.appendleft(item)
        else:
            queue.append(item)

    def pop(self) -> Item:
        """Take the next request; its client is charged from now on, until `ended`. IndexError when there is none."""
        if not self._waiting:
            raise IndexError("no request is waiting")
        client = min(self._waiting, key=self.served)  # of equals the one that came first
        queue = self._waiting[client]
        item = queue.popleft()
        if queue:
            self._waiting.move_to_end(client)  # of equals now the last
        else:
            del self._waiting[client]
        self._running[client] += 1
        return item

    def charge(self, client: str, tokens: int) -> None:
        """Put tokens on a client's account; negative ones are given back."""
        self._served[client] = self.served(client) + tokens

    def ended(self, client: str) -> None:
        """One request of `client` that was popped has ended."""
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]
        if not self._running and not self._waiting:
            self._served.clear()

    def remove(self, condition: Callable[[Item], bool]) -> list[Item]:
        """Take out the waiting requests for which `condition` holds."""
        found: list[Item] = []
        for client, queue in list(self._waiting.items()):
            taken = [item for item in queue if condition(item)]
            if taken:
                found += taken
                kept = deque(item for item in queue if item not in taken)
                if kept:
                    self._waiting[client] = kept
                else:
                    del self._waiting[client]
        return found

    def _arrive(self, client: str) -> None:
        present = [self.served(other) for other in {*self._waiting, *self._running}]
        self._served[client] = max(self.served(client), min(present, default=0))
        self._served.move_to_end(client)
        while len(self._served) > _REMEMBERED:
            stale = next((c for c in self._served if c not in self._waiting and c not in self._running), None)
            if stale is None or stale == client:
                break
            del self._served[stale]
