from lmscale.base.lru import LruCache


def test_the_least_recently_used_values_are_dropped_first() -> None:
    dropped: list[str] = []
    cache: LruCache[int, str] = LruCache(2, on_drop=dropped.append)
    cache.put(1, "a")
    cache.put(2, "b")
    assert cache.get(1) == "a"
    cache.put(3, "c")
    assert (cache.get(1), cache.get(2), cache.get(3)) == ("a", None, "c")
    cache.put(3, "d")
    cache.pop(7)
    cache.clear()
    assert dropped == ["b", "c", "a", "d"]


def test_capacity_is_a_sum_of_costs() -> None:
    cache: LruCache[str, bytes] = LruCache(10, cost=len)
    cache.put("a", bytes(4))
    cache.put("b", bytes(4))
    cache.put("large", bytes(11))  # above the capacity: nothing is dropped for it
    assert cache.get("a") is not None
    assert cache.get("b") is not None
    assert cache.get("large") is None
    cache.make_room(6)
    assert cache.get("a") is None
    cache.put("c", bytes(6))
    assert cache.get("b") is not None
