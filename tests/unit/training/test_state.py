"""What a run remembers of its validations."""

from mffm.training.state import TrainState


def after(validations: dict[int, float], finish_start: int | None) -> TrainState:
    state = TrainState(0, {}, "", 1)
    for step, value in validations.items():
        state.step = step
        state.note({"val/loss": value, "val/pbe/loss": value}, "val/loss", ["val/loss", "val/pbe/loss"], finish_start)
    return state


def test_the_best_is_kept_with_its_step_and_the_validations_since_then():
    state = after({5: 3.0, 10: 1.0, 15: 2.0, 20: float("nan")}, None)
    assert state.best["val/loss"] == {"value": 1.0, "step": 10}
    assert state.validations_since_best == 2


def test_a_last_part_of_the_run_forgets_what_was_better_before():
    state = after({5: 1.0, 10: 4.0, 12: 3.0, 15: 2.0, 20: 2.5, 25: 2.6}, finish_start=12)
    assert state.best["val/loss"] == {"value": 2.0, "step": 15}
    assert state.best["val/pbe/loss"] == {"value": 1.0, "step": 5}
    assert state.validations_since_best == 2
    assert after({5: 1.0, 10: 4.0}, finish_start=12).validations_since_best == 0, "it must come to its last part"
