"""Random orders: each element once, in an order that is random and depends on the key alone."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.orders import RandomOrder, random_order


@given(st.integers(1, 300), st.text(max_size=3))
@settings(max_examples=50, deadline=None)
def test_every_element_has_one_place(length, key):
    order = RandomOrder(length, key)
    assert sorted(order[i] for i in range(length)) == list(range(length))
    assert sorted(random_order(length, key)) == list(range(length))


@pytest.mark.parametrize("length", [10**9 + 7, 2**40])
def test_long_orders_are_never_written_down(length):
    order = RandomOrder(length, "key")
    elements = [order[i] for i in range(1000)]
    assert len(set(elements)) == 1000 and min(elements) >= 0 and max(elements) < length
    assert np.mean(elements) / length == pytest.approx(0.5, abs=0.05)  # 5 standard deviations
    assert abs(np.corrcoef(elements, range(1000))[0, 1]) < 0.2


def test_all_orders_of_four_are_about_equally_frequent():
    for make in (lambda key: RandomOrder(4, key), lambda key: random_order(4, key).tolist()):
        counts = collections.Counter(tuple(order[i] for i in range(4)) for order in map(make, map(str, range(2400))))
        assert len(counts) == 24
        assert min(counts.values()) > 50 and max(counts.values()) < 150  # 100 expected, 5 standard deviations


def test_orders_are_pinned():
    # Runs continue on other versions of the libraries: another order would repeat some windows and skip others.
    order = RandomOrder(10, "key")
    assert [order[i] for i in range(10)] == [5, 2, 9, 4, 8, 7, 6, 3, 0, 1]
    assert [RandomOrder(10**12, "key")[i] for i in range(2)] == [498265800847, 903123570627]
    assert random_order(10, "key").tolist() == [6, 5, 2, 0, 8, 1, 3, 7, 9, 4]
