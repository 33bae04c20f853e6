"""The rows of a step are a pure function of the seed and the step."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.train.position import Stream, group, rng_of


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 40), count=st.integers(1, 50), seed=st.integers(0, 5))
def test_every_item_comes_once_an_epoch(size, count, seed):
    stream = Stream(size, seed)
    steps = -(-3 * size // count)
    items = [item for step in range(steps) for item in stream.batch(step, count)][: 3 * size]
    for epoch in range(3):
        assert sorted(i for e, i in items if e == epoch) == list(range(size))


def test_a_step_does_not_depend_on_the_steps_before():
    forward = Stream(7, "a")
    whole = [forward.batch(step, 4) for step in range(9)]
    assert [Stream(7, "a").batch(step, 4) for step in reversed(range(9))] == whole[::-1]


def test_epochs_and_seeds_give_other_orders():
    stream = Stream(50, 0)
    first, second = [[i for _, i in stream.batch(e, 50)] for e in range(2)]
    assert first != second
    assert first != [i for _, i in Stream(50, 1).batch(0, 50)]


def test_generators_depend_on_their_keys_alone():
    assert rng_of("a", 1).integers(1 << 60) == rng_of("a", 1).integers(1 << 60)
    draws = {
        int(rng_of(*keys).integers(1 << 60)) for keys in [("a", 1), ("a", 2), ("a1",), (1, "a")]
    }
    assert len(draws) == 4


def test_group_lists_positions_by_key():
    assert group(np.array([2, 0, 2]), 3) == [[1], [], [0, 2]]
