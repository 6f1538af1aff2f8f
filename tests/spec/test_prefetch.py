"""Prefetched batches."""

import threading

import pytest

from twingpt.data.prefetch import Prefetcher


def test_numbers_in_order_are_made_once_each_in_another_thread():
    made, threads = [], set()

    def make(number):
        made.append(number)
        threads.add(threading.current_thread().name)
        return number * 10

    prefetcher = Prefetcher(make)
    assert [prefetcher(i) for i in range(5)] == [0, 10, 20, 30, 40]
    prefetcher.next[1].result()
    assert sorted(made) == [0, 1, 2, 3, 4, 5] and len(threads) == 2


def test_any_other_number_is_right_too():
    prefetcher = Prefetcher(lambda number: number * 10)
    assert [prefetcher(i) for i in (3, 4, 9, 0, 1)] == [30, 40, 90, 0, 10]


def test_the_next_one_is_made_before_it_is_asked_for():
    made = threading.Event()

    def make(number):
        if number == 1:
            made.set()
        return number

    prefetcher = Prefetcher(make)
    prefetcher(0)
    assert made.wait(200) and prefetcher(1) == 1


def test_an_error_is_raised_where_its_number_is_asked_for():
    def make(number):
        if number == 2:
            raise ValueError("two")
        return number

    prefetcher = Prefetcher(make)
    assert [prefetcher(0), prefetcher(1)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        prefetcher(2)
