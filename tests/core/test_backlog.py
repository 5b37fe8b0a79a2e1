"""Which checkpoint is evaluated next, which is left out, and which may not be deleted."""

from pathlib import Path

from ddetr.core.training.backlog import Backlog, Waiting
from hypothesis import given
from hypothesis import strategies as st


def at(step: int, tries: int = 0) -> Waiting:
    return Waiting(step, Path(f"step_{step:08d}"), tries)


def test_the_newest_is_next_and_the_oldest_of_too_many_left_out() -> None:
    backlog, left_out = Backlog(2).with_(at(10))
    backlog = backlog.begun(0.0)
    assert (backlog.at_work, left_out) == (at(10), ())
    for step in (20, 30):
        backlog, left_out = backlog.with_(at(step))
        assert left_out == ()
    assert backlog.begun(0.0) is backlog, "one at a time"
    backlog, left_out = backlog.with_(at(40))
    assert left_out == (at(20),)
    assert backlog.all == (at(30), at(40), at(10))
    backlog = backlog.ended()[0].begun(0.0)
    assert (backlog.at_work, backlog.waiting) == (at(40), (at(30),))
    backlog, left_out = backlog.ended(at(40, tries=1))
    assert (backlog.begun(0.0).at_work, left_out) == (at(40, tries=1), ())


def test_a_step_that_is_saved_again_waits_once() -> None:
    """As after a resume from before it."""
    backlog, left_out = Backlog(3).with_(at(10, tries=2), at(20))
    backlog, left_out = backlog.with_(at(10))
    assert (backlog.waiting, left_out) == ((at(10), at(20)), ())


@given(st.integers(1, 5), st.lists(st.one_of(st.integers(1, 30), st.sampled_from(["begin", "end", "again"]))))
def test_every_checkpoint_ends_somewhere(most: int, moves: list[int | str]) -> None:
    """Each is waiting, at work, done or left out, and none in two of them; at most so many are held."""
    backlog, known, done, left = Backlog(most), set[int](), set[int](), set[int]()
    for move in moves:
        out: tuple[Waiting, ...] = ()
        if move == "begin":
            newest = max(backlog.waiting, default=None)
            before = backlog.at_work
            backlog = backlog.begun(0.0)
            assert backlog.at_work == (before or newest)
        elif move in ("end", "again"):
            item = backlog.at_work
            backlog, out = backlog.ended(item if move == "again" else None)
            if item and move == "end":
                done.add(item.step)
        elif isinstance(move, int) and move not in known:
            known.add(move)
            backlog, out = backlog.with_(at(move))
        left |= {item.step for item in out}
        held = [item.step for item in backlog.all]
        assert len(held) == len(set(held)) <= most + 1
        assert set(held) | done | left == known
        assert len(held) + len(done) + len(left) == len(known)
        assert [item.step for item in backlog.waiting] == sorted(item.step for item in backlog.waiting)


def test_what_may_not_be_tried_yet_is_passed_over() -> None:
    backlog, _ = Backlog(3).with_(at(10), at(20)._replace(not_before=5.0))
    assert backlog.begun(4.0).at_work == at(10)
    assert backlog.begun(5.0).at_work == at(20)._replace(not_before=5.0)
