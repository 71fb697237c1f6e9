"""Caches the encodings of the most recently used texts.

Most requests have the same negative prompt, and many repeat a prompt with another seed.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")


@dataclass(frozen=True)
class TextKey:
    """Everything that the encoding of one text depends on, given the checkpoint; compared by value, not by a digest."""

    text: str  # what CLAP reads
    tokens: tuple[int, ...]  # what the second encoder reads: T5's tokens, or VITS's of the transcription
    length: int  # the length that the second encoder's sequence counts as in GPT-2, padding included


class EmbeddingCache(Generic[V]):
    """Keeps at most `capacity` values and drops the least recently used; several threads may share it."""

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"capacity: got {capacity} but expected at least 0")
        self._capacity = capacity
        self._values: OrderedDict[TextKey, V] = OrderedDict()
        self._hits = self._misses = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def take_counts(self) -> tuple[int, int]:
        """Returns how many keys needed no encoding, and how many did, since this was last asked."""
        with self._lock:
            counts = self._hits, self._misses
            self._hits = self._misses = 0
        return counts

    def values(self, keys: Sequence[TextKey], encode: Callable[[list[TextKey]], Sequence[V]]) -> list[V]:
        """Returns the value of each key, in order.

        `encode` is called at most once, with each missing key once, and returns their values in order. If it raises,
        that is raised and nothing is kept. Two threads that miss the same key both encode it.
        """
        found: dict[TextKey, V] = {}
        with self._lock:
            for key in keys:
                if key in self._values:
                    self._values.move_to_end(key)
                    found[key] = self._values[key]
            missing = list(dict.fromkeys(key for key in keys if key not in found))
            self._hits += len(keys) - len(missing)
            self._misses += len(missing)
        if missing:
            encoded = dict(zip(missing, encode(missing), strict=True))
            found |= encoded
            with self._lock:
                self._values |= encoded
                while len(self._values) > self._capacity:
                    self._values.popitem(last=False)
        return [found[key] for key in keys]
