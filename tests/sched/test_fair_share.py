"""Counters of tokens served: who is lifted, who is not, and how many are kept."""

from __future__ import annotations

from tandem.sched.fair import FairShare


def test_idle_time_earns_no_credit() -> None:
    share = FairShare()
    share.arrive("busy")
    share.charge("busy", 100)
    share.arrive("late")
    assert share.served["late"] == 100
    share.leave("busy")
    share.charge("late", 50)
    share.arrive("busy")
    assert share.served["busy"] == 150


def test_having_had_more_is_not_forgiven_by_a_pause() -> None:
    share = FairShare()
    share.arrive("a")
    share.arrive("b")
    share.charge("a", 100)
    share.leave("a")
    share.arrive("a")
    assert dict(share.served) == {"a": 100, "b": 0}


def test_after_a_pause_of_all_the_newcomer_starts_where_the_last_one_stopped() -> None:
    share = FairShare()
    share.arrive("a")
    share.charge("a", 70)
    share.leave("a")
    share.arrive("b")
    assert share.served["b"] == 70


def test_counters_of_idle_clients_are_bounded() -> None:
    share = FairShare(max_clients=10)
    for n in range(100):
        share.arrive(str(n))
        share.charge(str(n), n)
        share.leave(str(n))
        assert len(share.served) <= 11  # one is here, and those that are not are looked at only once they are too many
        assert str(n) in share.served
    assert share.served["99"] >= 99


def test_those_who_had_most_are_remembered_longest() -> None:
    share = FairShare(max_clients=4)
    for n in range(5):
        share.arrive(str(n))
    for n in range(5):
        share.charge(str(n), 100 - n)
    for n in range(5):
        share.leave(str(n))
    assert set(share.served) == {"0", "3", "4"}  # three were idle when there were too many
    share.arrive("0")
    assert share.served["0"] == 100
