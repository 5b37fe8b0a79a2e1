"""Who is to blame when ranks hang, and what all of them log: from what was heard, without a process."""

import math

import pytest
from ddetr.core.training.messages import encoded
from ddetr.core.training.verdict import (
    Beat,
    Beats,
    Finding,
    Identity,
    Patience,
    Quiet,
    States,
    described,
    failure,
    from_a_collective,
    judge,
    named,
)

HOSTS = ("a", "a", "b", "b")
IDENTITIES = [Identity(host, 100 + rank, f"machine {host}") for rank, host in enumerate(HOSTS)]
PATIENCE = Patience(silence=60, stall=1800)
STORE = "10.0.0.1:29500"
WAITING = ["trainer.py:9 train", "torch/distributed/distributed_c10d.py:1 all_reduce"]
LOADING = ["trainer.py:5 train", "stream.py:8 next"]


def beat(step: int = 7, activity: str = "training", seconds: float = 2, stack: list[str] | None = None) -> Beat:
    return Beat(3 * step, step, activity, seconds, [step, step + 1], stack or ["trainer.py:9 train"])


def quiet(store: float = 1, ranks: dict[int, float] | None = None, moves: float = 1) -> Quiet:
    return Quiet(store, dict.fromkeys(range(4), 1.0) | (ranks or {}), moves)


def judged(states: States | None = None, beats: Beats | None = None, silences: Quiet | None = None) -> Finding | None:
    """By a rank 0 on host a, where all is well but for what is given."""
    beats = beats or Beats({rank: beat() for rank in range(4)})
    return judge(IDENTITIES, {1: "S"} if states is None else states, beats, silences or quiet(), PATIENCE, STORE)


def stacks_in(text: str) -> list[str]:
    """The ranks whose stack a text shows, in its order."""
    return [line.partition(" (pid ")[0] for line in text.splitlines() if line.endswith(":") and " (pid " in line]


@pytest.mark.parametrize("state", ["R", "S", "D", "T", "t"])
def test_nothing_is_wrong_while_all_are_heard_in_time(state: str) -> None:
    assert judged({1: state}, silences=quiet(60, dict.fromkeys(range(4), 60.0), 1800)) is None


@pytest.mark.parametrize("state", [None, "Z", "X"])
def test_a_process_that_is_gone_is_dead_at_once(state: str | None) -> None:
    assert judged({1: state}) == Finding("rank 1 on a died", [1])
    assert judged({1: state, 2: state, 3: state}) == Finding("rank 1 on a, ranks 2, 3 on b died", [1, 2, 3])


def test_a_silent_rank() -> None:
    assert judged(silences=quiet(ranks={2: 60.1})) == Finding("nothing was heard of rank 2 on b for 60 s", [2])


def test_a_store_that_does_not_answer_is_no_ranks_fault() -> None:
    """Nothing is heard of any rank then, or gets further."""
    found = judged(silences=quiet(61, dict.fromkeys(range(4), 61.0), 2000))
    assert found == Finding(
        "the store at 10.0.0.1:29500, where the ranks met, has not answered for 60 s: its host is gone or stopped, or "
        "the network between is cut",
        [],
    )


def test_all_get_nowhere() -> None:
    assert judged(silences=quiet(moves=1801)) == Finding("no rank got any further for 1800 s", None)


def test_the_surest_is_said_first() -> None:
    foreign, lost = Beats.of({0: b"GET / HTTP/1.1"}), quiet(61, {2: 61}, 1801)
    texts = []
    for states, silences in (({1: None}, lost), ({}, lost), ({}, quiet(1, {2: 61}, 1801)), ({}, quiet(moves=1801))):
        found = judged(states, foreign, silences)
        assert found is not None
        texts.append(found.text)
    starts = ["rank 1 on a died", "the store at ", "nothing was heard of rank 2", "in the store at "]
    assert [text[: len(start)] for text, start in zip(texts, starts, strict=True)] == starts


def test_words_of_ranks_are_read_and_those_of_others_refused() -> None:
    mine = beat(seconds=math.inf)
    assert Beats.of({0: encoded(mine, Beat), 1: b""}) == Beats({0: mine})
    for word in (b"GET / HTTP/1.1", b"{}", b'{"moves":1,"step":2,"activity":"","seconds":0,"images":[],"stack":[]}'):
        found = judged(beats=Beats.of({0: encoded(mine, Beat), 3: word}))
        assert found is not None
        assert found.suspects == []
        assert found.text.startswith(f"in the store at {STORE}, where the ranks met, rank 3 sent b'{word[:5].decode()}")
        assert "It is no rank of this version of ddetr, or somebody else reaches the ports of the run" in found.text
        assert described(found, Beats.of({3: word}), IDENTITIES, {}) == found.text


def test_who_is_furthest_behind_and_does_not_wait_is_named_first() -> None:
    """Rank 3 has not begun the step that the others wait for; of those that wait none is to blame."""
    beats = Beats({rank: beat(stack=WAITING) for rank in range(3)} | {3: beat(6, "waiting for its batch", 40, LOADING)})
    text = described(Finding("no rank got any further for 1800 s", None), beats, IDENTITIES, {})
    assert text.splitlines() == [
        "no rank got any further for 1800 s",
        "where the ranks were when last heard of:",
        "  step 6, waiting for its batch for 40 s, in stream.py:8 next: rank 3 on b",
        f"  step 7, training for 2 s, in {WAITING[1]}: ranks 0, 1 on a, rank 2 on b",
        "rank 3 on b (pid 103), its images [6, 7]:",
        "  trainer.py:5 train",
        "  stream.py:8 next",
    ]


def test_within_a_step_those_that_wait_in_a_collective_are_not_to_blame() -> None:
    beats = Beats({0: beat(stack=WAITING), 1: beat(stack=LOADING), 2: beat(stack=WAITING), 3: beat(8, stack=LOADING)})
    assert stacks_in(described(Finding("hangs", None), beats, IDENTITIES, {})) == ["rank 1 on a"]


def test_where_all_wait_whoever_is_alone_comes_first() -> None:
    other = [*WAITING[:1], "torch/distributed/distributed_c10d.py:2 barrier"]
    beats = Beats({rank: beat(stack=other if rank == 2 else WAITING) for rank in range(4)})
    text = described(Finding("hangs", None), beats, IDENTITIES, {})
    assert stacks_in(text) == ["rank 2 on b", "rank 0 on a", "rank 1 on a", "rank 3 on b"]


def test_a_collective_far_outside_is_no_waiting() -> None:
    """A hook that DeepSpeed calls within one, say: what counts is what the rank does now."""
    deep = [*WAITING, *(f"engine.py:{line} work" for line in range(4))]
    beats = Beats({rank: beat(stack=deep if rank == 1 else WAITING) for rank in range(4)})
    assert stacks_in(described(Finding("hangs", None), beats, IDENTITIES, {})) == ["rank 1 on a"]


def test_a_stopped_process_is_said_to_be() -> None:
    beats = Beats({rank: beat() for rank in range(4)})
    text = described(Finding("nothing was heard", [1, 2]), beats, IDENTITIES, {1: "T"})
    assert "rank 1 on a (pid 101, stopped by a signal), its images [7, 8]:" in text
    assert "rank 2 on b (pid 102), its images [7, 8]:" in text


def test_many_ranks_make_a_line_a_place_and_few_stacks() -> None:
    """512 ranks on 64 hosts; those of the last two hosts are lost, of one of them nothing was ever heard."""
    identities = [Identity(f"node{rank // 8}", rank, f"machine {rank // 8}") for rank in range(512)]
    beats = Beats({rank: beat(rank % 2, seconds=rank) for rank in range(511)})
    lost = list(range(496, 512))
    text = described(Finding(f"{named(lost, identities)} died", lost), beats, identities, {})
    lines = text.splitlines()
    whole = ", ".join
    assert lines[0] == (
        f"ranks {whole(map(str, range(496, 504)))} on node62, ranks {whole(map(str, range(504, 512)))} on node63 died"
    )
    assert lines[2].startswith(
        "  step 0, training for 510 s, in trainer.py:9 train: ranks 0, 2, 4, 6 on node0, ranks 8"
    )
    assert lines[3].endswith(", ranks 505, 507, 509 on node63")
    assert stacks_in(text) == [f"rank {rank} on node62" for rank in range(496, 504)]


def test_nothing_heard_of_anybody() -> None:
    text = described(Finding("no rank got any further for 1800 s", None), Beats({}), IDENTITIES, {})
    assert text.startswith("no rank got any further for 1800 s\n")


def test_a_failure_names_the_rank_and_its_error() -> None:
    found = failure(2, 9, OSError(28, "No space left on device", "shard.tar"), IDENTITIES)
    assert found == Finding(
        "rank 2 on b failed in step 9: OSError: [Errno 28] No space left on device: 'shard.tar'", [2]
    )


def test_an_error_of_a_collective_is_told_from_ones_own() -> None:
    import torch.distributed as dist

    with pytest.raises(ValueError, match="process group") as of_torch:
        dist.barrier()
    with pytest.raises(ZeroDivisionError) as own:
        print(1 / 0)
    assert from_a_collective(of_torch.value.__traceback__)
    assert not from_a_collective(own.value.__traceback__)
    assert not from_a_collective(None)
