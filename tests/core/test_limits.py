"""How much may go wrong in a run: worked out by hand."""

from ddetr.core.training.limits import Limits


def test_skipped_steps_count_in_a_row() -> None:
    limits, over = Limits(most_skipped=3, most_bad=0), []
    for skipped in (True, True, False, True, True, True):
        limits = limits.after(skipped, ())
        over.append(limits.has_skipped_too_many)
    assert over == [False, False, False, False, False, True]
    assert limits.skipped == 3


def test_a_bad_image_counts_once() -> None:
    limits = Limits(most_skipped=1, most_bad=1.5)
    for found in (["a"], ["a", "a"], [], ["a"]):
        limits = limits.after(False, found)
        assert not limits.has_too_many_bad
    assert limits.after(False, ["b"]).has_too_many_bad


def test_none_may_be_bad() -> None:
    limits = Limits(most_skipped=1, most_bad=0)
    assert not limits.has_too_many_bad
    assert limits.after(False, ["a"]).has_too_many_bad
