"""The driver's record of a call on several replicas: who gets which item, and what happens when one dies or is slow."""

import pytest

import mechsafety as ms
from mechsafety.scale.board import DEATHS, SLOW_SECONDS, Board
from mechsafety.scale.machine import Machine
from mechsafety.scale.work import Forgotten, Sweep


def board(n=4, groups=(), known=()):
    class Known(Forgotten):
        def bytes_of(self, sweep, place):
            return b"known" if place.item in known else None

    made = Board(Known(Machine(1, {})))
    made.seen(Sweep(0, "patching", n, "sha", groups))
    return made


def test_each_item_is_given_once_and_outcomes_are_kept():
    made = board()
    assert [made.take(0, replica, 0.0) for replica in (1, 2, 1, 2, 1)] == [0, 1, 2, 3, None]
    assert all(made.put(0, item, 1 + item % 2, b"%d" % item, 1.0) for item in range(4))
    assert made.sweeps[0].complete and made.sweeps[0].done == {k: b"%d" % k for k in range(4)}


def test_what_an_earlier_run_kept_is_not_given():
    made = board(known=(0, 2))
    assert [made.take(0, 1, 0.0) for _ in range(3)] == [1, 3, None]


def test_a_replica_stays_in_its_group_and_then_takes_one_that_nobody_is_at():
    made = board(6, (0, 0, 0, 1, 1, 2))
    assert [made.take(0, replica, 0.0) for replica in (1, 2, 1, 1)] == [0, 3, 1, 2]
    assert made.take(0, 1, 0.0) == 5 and made.take(0, 1, 0.0) == 4


def test_the_item_of_a_lost_replica_is_given_again():
    made = board(2)
    assert made.take(0, 1, 0.0) == 0 and made.take(0, 2, 0.0) == 1
    made.lost(1)
    assert made.take(0, 2, 0.0) == 0


def test_an_item_at_which_replicas_die_ends_the_call():
    made = board(1)
    for replica in range(DEATHS - 1):
        assert made.take(0, replica, 0.0) == 0
        made.lost(replica)
    made.take(0, 9, 0.0)
    with pytest.raises(ms.MechsafetyError, match=f"{DEATHS} workers died at item 0 of patching"):
        made.lost(9)


def test_a_slow_item_is_given_twice_and_the_first_outcome_counts():
    made = board(3)
    for replica in (1, 2, 3):
        made.take(0, replica, 0.0)
    made.put(0, 0, 1, b"0", 1.0)
    assert made.take(0, 1, SLOW_SECONDS - 0.1) is None
    assert made.take(0, 1, SLOW_SECONDS + 0.1) == 1 and made.repeated == 1
    assert made.take(0, 4, SLOW_SECONDS + 0.2) == 2  # not the one that two compute already
    assert made.put(0, 1, 1, b"first", 6.0) and not made.put(0, 1, 2, b"second", 7.0)
    assert made.sweeps[0].done[1] == b"first"


def test_replicas_at_different_work_end_the_call():
    made = board()
    with pytest.raises(ms.MechsafetyError, match=r"different work \(step 0: patching, edges\)"):
        made.seen(Sweep(0, "edges", 4, "other"))
