"""The exchange: the window bounds what is under way, and each row drawn has one fate."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.runlog import Ledger
from sbir_ray.stream.exchange import Exchange

USED = ("used", "")


def pull(exchange, rank, session):
    """The number of the next batch, opened; None if none is there."""
    found = exchange.give(rank, session, 0.0)
    if not found.batch:
        return None
    (number,) = found.batch
    return number if exchange.opened(rank, session, number) else None


def test_no_more_than_the_window_is_granted_until_a_learner_asks_for_more():
    exchange = Exchange(window=2, batch=4)
    session = exchange.attach(0)
    assert [exchange.take(n, 0.0) for n in (0, 1, 2)] == [[0], [1], []]
    for number in (0, 1):
        exchange.deliver([number])
    assert pull(exchange, 0, session) == 0
    # It has the first batch still.
    assert exchange.take(2, 0.0) == []
    assert pull(exchange, 0, session) == 1
    assert exchange.take(2, 0.0) == [2]
    assert exchange.ledger()["in_flight"] == 12


def test_a_source_that_starts_again_gets_the_same_numbers_and_draws_nothing_twice():
    exchange = Exchange(window=3, batch=2)
    assert [exchange.take(n, 0.0) for n in range(3)] == [[0], [1], [2]]
    assert [exchange.take(n, 0.0) for n in range(4)] == [[0, 1, 2], [1, 2], [2], []]
    assert exchange.ledger()["drawn"] == 6


def test_a_batch_that_comes_twice_is_opened_once():
    exchange = Exchange(window=2, batch=2)
    sessions = [exchange.attach(rank) for rank in (0, 1)]
    exchange.take(0, 0.0)
    exchange.deliver([0])
    exchange.deliver([0])
    assert pull(exchange, 0, sessions[0]) == 0
    assert pull(exchange, 1, sessions[1]) is None
    exchange.account({0: USED})
    exchange.account({0: ("stale", ""), 1: USED})
    assert exchange.ledger() == {
        "drawn": 2,
        "used": 2,
        "filtered": {},
        "stale": 0,
        "in_flight": 0,
    }


def test_what_a_lost_node_drew_is_granted_again_and_a_source_that_starts_again_gets_it_too():
    exchange = Exchange(window=3, batch=2)
    session = exchange.attach(0)
    assert [exchange.take(n, 0.0) for n in range(3)] == [[0], [1], [2]]
    exchange.deliver([1])
    assert pull(exchange, 0, session) == 1
    exchange.repeat()
    assert exchange.take(3, 0.0) == [0, 2]
    assert exchange.take(0, 0.0) == [0, 1, 2, 0, 2]
    assert exchange.begin(1, 0) is None
    for number in (0, 2, 2, 0):
        exchange.deliver([number])
    assert [pull(exchange, 0, session) for _ in range(5)] == [0, 2, None, None, None]
    assert exchange.take(5, 0.0) == [3]
    assert exchange.ledger()["drawn"] == 8


def test_what_a_dead_learner_had_is_lost_and_frees_the_window():
    exchange = Exchange(window=2, batch=2, first=10)
    session = exchange.attach(0)
    for number in (0, 1):
        exchange.take(number, 0.0)
        exchange.deliver([number])
    assert pull(exchange, 0, session) == 0
    exchange.account({10: USED})
    # The second batch is given, and its learner dies before it has it.
    assert exchange.give(0, session, 0.0).batch == [1]
    assert exchange.take(2, 0.0) == [2]
    assert exchange.take(3, 0.0) == []

    again = exchange.attach(0)
    assert not exchange.opened(0, session, 1)
    assert exchange.give(0, session, 0.0).batch == []
    assert exchange.take(3, 0.0) == [3]
    exchange.deliver([2])
    assert pull(exchange, 0, again) == 2
    found = exchange.ledger()
    assert (found["used"], found["filtered"], found["in_flight"]) == (1, {"lost": 1}, 6)


def test_a_generator_gets_weights_that_it_does_not_have_and_hears_of_tries():
    exchange = Exchange(window=3, batch=2)
    for number in range(3):
        exchange.take(number, 0.0)
    assert exchange.begin(0, 0) == (1, 0, 0, [])
    exchange.publish(5, ["five"])
    exchange.publish(6, ["six"])
    assert exchange.begin(0, 0) == (2, 2, 6, ["six"])
    assert exchange.begin(1, 2) == (1, 2, 6, [])
    # A learner that was set back publishes the same version again, with other weights.
    exchange.publish(6, ["other"])
    assert exchange.begin(2, 2) == (1, 3, 6, ["other"])


def test_the_end_reaches_all_who_wait():
    exchange = Exchange(window=1, batch=2)
    session = exchange.attach(0)
    exchange.take(0, 0.0)
    found = {}

    def waiting(name, call, *args):
        found[name] = call(*args)

    threads = [
        threading.Thread(target=waiting, args=("take", exchange.take, 1, 60.0)),
        threading.Thread(target=waiting, args=("give", exchange.give, 0, session, 60.0)),
    ]
    for thread in threads:
        thread.start()
    exchange.end("enough")
    exchange.end("later")
    for thread in threads:
        thread.join(10)
    assert found == {"take": None, "give": ([], "enough")}
    assert exchange.begin(0, 0) is None


def test_a_ledger_of_rows_in_flight_can_be_read_again():
    exchange = Exchange(window=2, batch=3)
    exchange.take(0, 0.0)
    exchange.account({0: ("filtered", "min_ink"), 1: ("stale", "")})
    ledger = Ledger.from_json("live", exchange.ledger(), "ledger.json")
    assert str(ledger) == "3 drawn: 0 used, 1 filtered (min_ink 1), 1 stale, 1 in_flight"


def test_another_fate_than_the_known_ones_is_a_fault():
    exchange = Exchange(window=1, batch=1)
    exchange.take(0, 0.0)
    exchange.account({0: ("kept", "")})
    with pytest.raises(KeyError):
        exchange.ledger()


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["take", "retake", "repeat", "deliver", "again", "pull", "drop", "die"]),
        st.integers(0, 1),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(window=st.integers(1, 4), actions=ACTIONS)
def test_every_row_has_one_fate_whatever_happens(window, actions):
    """Two learners; sources and generators that repeat themselves; learners that die."""
    exchange = Exchange(window, batch=2)
    sessions = [exchange.attach(rank) for rank in (0, 1)]
    order, had = [], []
    for action, rank, pick in actions:
        if action == "take":
            order += exchange.take(len(order), 0.0)
        elif action == "retake" and order:
            known = order[pick % len(order) :]
            assert exchange.take(pick % len(order), 0.0)[: len(known)] == known
        elif action == "repeat":
            exchange.repeat()
        granted = len(set(order))
        if action in ("deliver", "again") and granted:
            exchange.deliver([(granted - 1 if action == "deliver" else pick) % granted])
        elif action == "pull":
            number = pull(exchange, rank, sessions[rank])
            if number is not None:
                assert number not in had
                had.append(number)
        elif action == "drop" and had:
            fate = (USED, ("stale", ""), ("filtered", "min_ink"))[pick % 3]
            exchange.account({2 * had[pick % len(had)]: fate, 10**6: fate})
        elif action == "die":
            exchange.give(rank, sessions[rank], 0.0)
            sessions[rank] = exchange.attach(rank)
        granted = len(set(order))
        found = exchange.ledger()
        assert found["drawn"] == 2 * granted
        assert granted - len(had) <= window + exchange._lost
