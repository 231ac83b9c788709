"""Epochs, repeats and buckets hold what they promise, and every position follows from the seed alone."""

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from latentvae.data.order import Group, Stream, TrainingOrder
from latentvae.keyed import permutation


def group(start, stop, repeats="1"):
    return Group(np.arange(start, stop), Fraction(repeats))


def epoch(stream, number):
    """What one epoch of a stream holds, in order."""
    return [stream.draw(position) for position in range(stream.start(number), stream.start(number + 1))]


def test_without_repeats_an_epoch_is_the_permutation():
    indices = np.array([5, 3, 9, 4])
    stream = Stream([Group(indices)], 7)
    for number in range(3):
        drawn = epoch(stream, number)
        assert [draw.index for draw in drawn] == indices[permutation(7, number, 4)].tolist()
        assert {(draw.epoch, draw.copy) for draw in drawn} == {(number, 0)}


@pytest.mark.parametrize("repeats", ["2.5", "0.25", "3", "0.3", "1.75", "0.07"])
def test_repeats_are_met_by_every_image_and_every_epoch(repeats):
    n, rate = 41, Fraction(repeats)
    stream = Stream([group(0, n, repeats)], 3)
    total: Counter = Counter()
    for number in range(2 * rate.denominator):
        drawn = epoch(stream, number)
        assert abs(len(drawn) - n * rate) < 1
        counts = Counter(draw.index for draw in drawn)
        assert set(counts.values()) <= {int(rate), int(rate) + 1} - {0}
        for index, count in counts.items():
            assert sorted(draw.copy for draw in drawn if draw.index == index) == list(range(count))
        assert all(draw.epoch == number for draw in drawn)
        total += counts
    assert set(total.values()) == {2 * rate.numerator} and len(total) == n  # exactly, not on average


def test_a_quarter_is_another_quarter_in_each_of_four_epochs():
    quarters = [{draw.index for draw in epoch(Stream([group(0, 40, "0.25")], 0), number)} for number in range(8)]
    assert all(len(quarter) == 10 for quarter in quarters)
    assert set.union(*quarters[:4]) == set(range(40)) and quarters[0] == quarters[4]
    other = {draw.index for draw in epoch(Stream([group(0, 40, "0.25")], 1), 0)}
    assert other not in quarters and quarters[0] != set(range(min(quarters[0]), min(quarters[0]) + 10))


def test_sources_of_other_repeats_share_an_epoch():
    stream = Stream([group(0, 10, "2"), group(10, 14, "0.5"), group(14, 14), group(14, 20)], 5)
    assert stream.rate == 28
    counts = Counter(draw.index for draw in epoch(stream, 3))
    assert [counts[index] for index in range(10)] == [2] * 10 and [counts[index] for index in range(14, 20)] == [1] * 6
    assert sum(counts[index] for index in range(10, 14)) == 2
    order = [draw.index for draw in epoch(stream, 3)]
    assert order != sorted(order) and order != [draw.index for draw in epoch(stream, 4)]


def test_any_position_can_be_asked_for_first():
    def make():
        return Stream([group(0, 7, "1.3"), group(7, 12, "0.6")], 2)

    stream = make()
    forward = [stream.draw(position) for position in range(200)]
    backward = make()
    assert [backward.draw(position) for position in reversed(range(200))] == forward[::-1]
    assert [make().draw(position) for position in (0, 57, 199)] == [forward[0], forward[57], forward[199]]
    assert pickle.loads(pickle.dumps(stream)).draw(57) == forward[57]
    assert make().draw(10**12).epoch == 10**12 // Fraction("12.1")  # a long run costs no more


def buckets(batch=4):
    """Three buckets of 22, 9.5 and 5 images an epoch."""
    groups = [[group(0, 22)], [group(22, 27, "0.5"), group(27, 34)], [group(34, 39)]]
    return TrainingOrder([Stream(own, number) for number, own in enumerate(groups)], 1, batch)


def test_every_step_is_of_one_bucket_and_no_image_is_lost():
    order = buckets()
    places = [order.place(position) for position in range(4 * 400)]
    for step in range(400):
        of_step = places[4 * step : 4 * step + 4]
        assert len({place.bucket for place in of_step}) == 1
        assert [place.position - of_step[0].position for place in of_step] == [0, 1, 2, 3]
    for bucket, stream in enumerate(order.streams):
        positions = sorted(place.position for place in places if place.bucket == bucket)
        due = 1600 * stream.rate / order.rate
        assert abs(len(positions) - due) < 2 * 4 + 0.1 * due  # in proportion
        # each batch once, but for those that the epoch under way has not shown yet
        assert len(set(positions)) == len(positions) and positions[-1] - len(positions) < 3 * 4 * stream.rate
        whole = stream.start(40)
        assert set(range(whole)) <= set(positions)  # so that 40 epochs are complete: every image 40 times
    order_of_buckets = [place.bucket for place in places[::4]]
    assert order_of_buckets[:9] != sorted(order_of_buckets[:9])
    assert len({tuple(order_of_buckets[start : start + 9]) for start in range(0, 90, 9)}) > 5


def test_places_need_no_history_and_differ_by_seed():
    order = buckets()
    places = [order.place(position) for position in range(400)]
    assert [buckets().place(position) for position in (399, 8, 0)] == [places[399], places[8], places[0]]
    streams = [Stream(stream.groups, stream.seed) for stream in order.streams]
    assert [TrainingOrder(streams, 2, 4).place(position) for position in range(400)] != places


def test_a_small_set_makes_batches_over_several_epochs():
    order = TrainingOrder([Stream([group(0, 3)], 0)], 0, 8)
    drawn = [order.streams[0].draw(order.place(position).position) for position in range(12)]
    assert Counter(draw.index for draw in drawn) == {0: 4, 1: 4, 2: 4}
    two = TrainingOrder([Stream([group(0, 3)], 0), Stream([group(3, 5)], 1)], 0, 8)
    shown = Counter(two.place(position).bucket for position in range(0, 8 * 5 * 20, 8))
    assert shown == {0: 60, 1: 40}
