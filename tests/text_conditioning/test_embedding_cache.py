"""The cache of text encodings: bounded, and never another text's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_cache import EmbeddingCache, TextKey

# Few of each part, so that keys that differ in one part alone meet often.
KEYS = st.builds(
    TextKey,
    text=st.sampled_from(["", "a", "A", "a ", "b"]),
    tokens=st.sampled_from([(1,), (3, 1), (3, 9, 1)]),
    length=st.integers(3, 5),
)


def key(text: str, length: int = 2) -> TextKey:
    return TextKey(text, (1,), length)


class Recorder:
    """An encoding that is its key, and a record of what was encoded."""

    def __init__(self) -> None:
        self.calls: list[list[TextKey]] = []

    def __call__(self, keys: list[TextKey]) -> list[TextKey]:
        self.calls.append(keys)
        return keys


@given(capacity=st.integers(0, 6), batches=st.lists(st.lists(KEYS, max_size=8), max_size=20))
def test_a_value_is_always_its_own_keys(capacity: int, batches: list[list[TextKey]]) -> None:
    cache: EmbeddingCache[TextKey] = EmbeddingCache(capacity)
    recorder = Recorder()
    for batch in batches:
        before = len(recorder.calls)
        assert cache.values(batch, recorder) == batch
        assert len(cache) <= capacity
        encoded = [missing for call in recorder.calls[before:] for missing in call]
        assert len(set(encoded)) == len(encoded), "a text was encoded twice in one batch"
        assert len(recorder.calls) - before <= 1


def test_only_misses_are_encoded_each_once() -> None:
    cache: EmbeddingCache[TextKey] = EmbeddingCache(4)
    recorder = Recorder()
    cache.values([key("a"), key("b"), key("a")], recorder)
    cache.values([key("b"), key("c"), key("b", length=3)], recorder)
    cache.values([key("a"), key("c")], recorder)
    assert recorder.calls == [[key("a"), key("b")], [key("c"), key("b", length=3)]]
    assert cache.take_counts() == (4, 4)
    assert cache.take_counts() == (0, 0)


def test_the_least_recently_used_goes_first() -> None:
    cache: EmbeddingCache[TextKey] = EmbeddingCache(2)
    recorder = Recorder()
    for text in ("a", "b", "a", "c", "a", "b"):
        cache.values([key(text)], recorder)
    assert [call[0].text for call in recorder.calls] == ["a", "b", "c", "b"]


def test_a_batch_larger_than_the_cache_is_whole() -> None:
    cache: EmbeddingCache[TextKey] = EmbeddingCache(1)
    keys = [key("a"), key("b"), key("c"), key("a")]
    assert cache.values(keys, Recorder()) == keys
    assert len(cache) == 1


def test_a_capacity_of_none_keeps_nothing() -> None:
    cache: EmbeddingCache[TextKey] = EmbeddingCache(0)
    recorder = Recorder()
    for _ in range(2):
        cache.values([key("a"), key("a")], recorder)
    assert recorder.calls == [[key("a")]] * 2
    assert len(cache) == 0


def test_a_failure_is_raised_and_not_kept() -> None:
    cache: EmbeddingCache[TextKey] = EmbeddingCache(2)

    def fail(_: list[TextKey]) -> list[TextKey]:
        raise RuntimeError("no encoder")

    with pytest.raises(RuntimeError, match="no encoder"):
        cache.values([key("a")], fail)
    assert cache.values([key("a")], Recorder()) == [key("a")]


def test_a_negative_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity: got -1"):
        EmbeddingCache(-1)
