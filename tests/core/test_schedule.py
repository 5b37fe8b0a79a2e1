"""Which step is which, before and after a resume: worked out by hand."""

from pathlib import Path

import pytest
from ddetr.core.config import Config, ModelConfig, OptimConfig, TrainConfig, changed
from ddetr.core.progress import Position
from ddetr.core.training.changes import told_of_changes
from ddetr.core.training.schedule import Schedule, nothing_left, other_plan, planned


def of(per_epoch: int, done: Position | None = None, **settings: object) -> Schedule:
    return Schedule.of(TrainConfig.model_validate(settings), per_epoch, done)


def test_linear_is_constant_then_falls_to_zero() -> None:
    optim = OptimConfig(learning_rate=2.0, schedule="linear", warmup_steps=4, drop_epochs=(1,))
    schedule = of(10, epochs=10)
    rates = [schedule.learning_rate(optim, step) for step in range(100)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:61] == pytest.approx([2.0] * 57)
    assert rates[61:] == pytest.approx([2.0 * remaining / 40 for remaining in range(39, 0, -1)])


def test_the_same_batches_go_on_at_their_step() -> None:
    for step in range(31):
        done = of(6, epochs=5).position(step, "order")
        assert of(6, done, epochs=5) == of(6, epochs=5)
        assert other_plan(done, of(6, done, epochs=5), "order") is None


@pytest.mark.parametrize(
    ("done", "per_epoch", "epochs", "epoch", "in_epoch", "last_step"),
    [
        (Position(12, 2, 0, 6), 12, 3, 2, 0, 24),  # half the batch: one epoch of 12 more
        (Position(24, 2, 0, 12), 6, 3, 2, 0, 30),  # twice the batch: one epoch of 6 more
        (Position(15, 2, 3, 6), 12, 3, 2, 6, 21),  # half of the third epoch is done
        (Position(17, 2, 5, 6), 3, 3, 2, 2, 18),  # five sixths of it: one of three steps is left
        (Position(17, 2, 5, 6), 6, 3, 2, 5, 18),
        (Position(12, 2, 0, 6), 7, 2, 2, 0, 12),  # nothing is left
        (Position(3, 0, 3, 0), 6, 2, 0, 3, 12),  # written when the steps of an epoch were not kept
    ],
)
def test_epochs_are_neither_repeated_nor_skipped(
    done: Position, per_epoch: int, epochs: int, epoch: int, in_epoch: int, last_step: int
) -> None:
    schedule = of(per_epoch, done, epochs=epochs)
    assert (schedule.epoch(done.step), schedule.step_in_epoch(done.step)) == (epoch, in_epoch)
    assert schedule.last_step == last_step
    assert schedule.num_epochs == epochs
    # The epochs of all steps to come, one after another, each of its full length.
    to_come = [schedule.epoch(step) for step in range(done.step, schedule.last_step)]
    expected = [number for number in range(epoch, epochs) for _ in range(per_epoch)][in_epoch:]
    assert to_come == expected
    # And a second resume, of what the first one wrote, changes nothing.
    for step in range(done.step, last_step + 1):
        assert of(per_epoch, schedule.position(step, ""), epochs=epochs) == schedule


def test_max_steps_counts_the_steps_of_the_run() -> None:
    done = Position(12, 2, 0, 6)
    assert of(12, done, epochs=5, max_steps=20).last_step == 20
    assert of(12, done, epochs=3, max_steps=90).last_step == 24
    assert of(6, epochs=5, max_steps=20).num_epochs == 4


def test_the_rate_follows_the_epochs() -> None:
    done = Position(12, 2, 0, 6)
    steps = OptimConfig(learning_rate=1.0, drop_epochs=(3,))
    assert [of(12, done, epochs=4).learning_rate(steps, step) for step in (12, 23, 24, 35)] == [1, 1, 0.1, 0.1]
    linear = OptimConfig(learning_rate=1.0, schedule="linear")
    # Of five epochs the last two fall. The third begins after step 12, the fourth after 24, the run ends with 48.
    rates = [of(12, done, epochs=5).learning_rate(linear, step) for step in (12, 24, 36, 47)]
    assert rates == pytest.approx([1, 1, 0.5, 1 / 24])


def test_what_is_said_of_another_plan() -> None:
    done = Position(15, 2, 3, 6, "a")
    line = other_plan(done, of(12, done, epochs=3), "b")
    assert line is not None
    assert "an epoch has 12 steps now, and had 6 until step 15: 2 epoch(s) and 3 of 6 steps are done" in line
    assert "at step 6 of 12 of epoch 3: some of its images come twice in it, others not" in line
    same = other_plan(done, of(6, done, epochs=3), "b")
    assert same is not None
    assert "epoch 3 has another order of images now" in same
    whole = Position(12, 2, 0, 6, "a")
    assert other_plan(whole, of(6, whole, epochs=3), "b") is None  # a new epoch has its own order anyway


def test_the_plan_in_a_line() -> None:
    config = Config(train=TrainConfig(batch_size=4, epochs=5))
    assert planned(of(6, epochs=5), 26, config, None) == (
        "26 images: 6 steps of 4 images per epoch; 5 epochs, 30 steps in all; "
        "each epoch leaves out 2 images, as many as fill no batch (data.remainder=drop)"
    )
    done = Position(12, 2, 0, 6)
    assert planned(of(6, done, epochs=5, max_steps=20), 24, config, done).endswith(
        "20 steps in all; train.max_steps=20 ends it; 12 steps are done"
    )


def test_nothing_left_names_the_setting_that_ends_it() -> None:
    done = Position(12, 2, 0, 6)
    assert nothing_left(done, of(6, done, epochs=3)) is None
    by_epochs = nothing_left(done, of(6, done, epochs=2))
    assert by_epochs is not None
    assert "train.epochs=2 asks for no more; to go on, set a larger train.epochs" in by_epochs
    by_steps = nothing_left(done, of(6, done, epochs=5, max_steps=12))
    assert by_steps is not None
    assert "set a larger train.max_steps" in by_steps


def test_changed_settings_are_told_by_what_they_do(tmp_path: Path) -> None:
    model = ModelConfig(box_refine=True, two_stage=True)
    before = Config(model=model, optim=OptimConfig(schedule="linear"), train=TrainConfig(epochs=10))
    overrides = ["train.epochs=20", "model.queries=100", "train.initial_weights=x.pth", "model.dropout=0"]
    done = Position(80, 8, 0, 10)
    lines = told_of_changes(before, changed(before, overrides, "test"), tmp_path, done, 10)
    assert lines == [
        "settings changed since step 80: model.dropout 0.1 -> 0.0, train.epochs 10 -> 20",
        "without effect, the run goes on with its weights in its folder: train.initial_weights null -> x.pth",
        "the weights fit, but the model computes something else with them: model.queries 300 -> 100",
        "the learning rate of step 81 is 0.0002 and would have been 0.0001",
    ]
    assert told_of_changes(before, before, tmp_path, done, 10) == []
    moved = changed(before, [f"train.output={tmp_path.parent}", f"train.name={tmp_path.name}"], "test")
    assert told_of_changes(before, moved, tmp_path, done, 10) == []


@pytest.mark.parametrize(
    ("settings", "saves", "evaluates"),
    [
        # Three epochs of 4 steps; by default both after each epoch.
        ({}, [4, 8, 12], [4, 8, 12]),
        ({"checkpoint_every_epochs": 0, "evaluate_every_epochs": 0}, [12], []),
        ({"checkpoint_every_epochs": 2, "evaluate_every_epochs": 0}, [8, 12], []),
        ({"checkpoint_every_epochs": 0, "evaluate_every_epochs": 2}, [8, 12], [8, 12]),
        ({"checkpoint_every_epochs": 0, "evaluate_every_epochs": 5}, [12], [12]),
        # Within an epoch: not at its end, where the epochs decide.
        (
            {"checkpoint_every_steps": 2, "checkpoint_every_epochs": 0, "evaluate_every_epochs": 0},
            [2, 6, 10, 12],
            [],
        ),
        ({"checkpoint_every_steps": 3, "evaluate_every_epochs": 0}, [3, 4, 6, 8, 9, 12], []),
        # The last step may lie amid an epoch.
        ({"max_steps": 6}, [4, 6], [4, 6]),
        ({"max_steps": 6, "checkpoint_every_epochs": 0, "evaluate_every_epochs": 2}, [6], [6]),
    ],
)
def test_what_is_due_after_which_step(settings: dict[str, int], saves: list[int], evaluates: list[int]) -> None:
    schedule = of(4, epochs=3, **settings)
    due = {step: schedule.due(step) for step in range(1, schedule.last_step + 1)}
    assert [step for step in due if due[step].save] == saves
    assert [step for step in due if due[step].evaluate] == evaluates
    assert [step for step in due if due[step].last] == [schedule.last_step]


def test_nothing_is_evaluated_without_a_set_for_it() -> None:
    schedule = Schedule.of(TrainConfig(epochs=3), 4, evaluates=False)
    assert not any(schedule.due(step).evaluate for step in range(1, 13))
    assert [step for step in range(1, 13) if schedule.due(step).save] == [4, 8, 12]


def test_epochs_of_another_length_are_due_at_their_own_ends() -> None:
    schedule = of(12, Position(15, 2, 3, 6), epochs=3)  # half of the third epoch is done, six steps of it are left
    assert [step for step in range(16, 22) if schedule.due(step).save] == [21]
