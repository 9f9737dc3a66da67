"""Why keys left: the last reason counts, and memory is bounded."""

from respkv.engine.history import History


def test_the_last_reason_is_remembered() -> None:
    history = History()
    assert history.find(b"k") is None
    history.note(b"k", "evicted")
    history.note(b"k", "deleted")
    assert history.find(b"k") == "deleted"
    assert history.find(b"other") is None


def test_the_key_that_left_longest_ago_is_forgotten_first() -> None:
    history = History(count_max=3)
    for key in (b"a", b"b", b"c"):
        history.note(key, "evicted")
    history.note(b"a", "expired")  # now it is the youngest
    history.note(b"d", "deleted")
    assert history.find(b"b") is None
    assert [history.find(key) for key in (b"a", b"c", b"d")] == ["expired", "evicted", "deleted"]
    for number in range(100):
        history.note(b"%d" % number, "flushed")
    assert [history.find(b"%d" % number) for number in (96, 97)] == [None, "flushed"]
