import jax.numpy as jnp
import pytest

from dit_jax.train import loop
from dit_jax.train.state import TrainState


def train(*, total_steps, start=0, bad_step=None, stop_at=None, log_every=4, checkpoint_every=6):
    """Runs the loop with a step that only counts; returns what it did, in order."""
    events = []

    def train_step(state, batch, key):
        assert batch == int(state.step)  # the batch of this step, whatever the start
        step = state.step + 1
        loss = jnp.where(step == bad_step, jnp.nan, step.astype(jnp.float32))
        return state._replace(step=step), {"loss": loss}

    def run():
        return loop.run(
            TrainState(jnp.int32(start), None, None, None),
            train_step,
            iter(range(start, 1000)),
            None,
            total_steps=total_steps,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            log=lambda step, means, seconds: events.append(("log", step, means["loss"])),
            save=lambda step, state: events.append(("save", step)),
            hooks=[(5, lambda step, state: events.append(("hook", step)))],
            stop_requested=lambda: ran() == stop_at,
        )

    calls = []

    def ran():
        calls.append(1)
        return start + len(calls)

    return run, events


def test_everything_happens_in_its_step():
    run, events = train(total_steps=12)
    assert int(run().step) == 12
    assert events == [
        ("log", 4, 2.5),  # the mean of 1 .. 4
        ("hook", 5),
        *[("log", 6, 5.5), ("save", 6)],
        ("log", 8, 7.5),
        ("hook", 10),
        *[("log", 12, 10.5), ("save", 12), ("hook", 12)],
    ]


def test_a_resumed_run_keeps_the_rhythm():
    run, events = train(total_steps=12, start=7)
    run()
    assert [e[:2] for e in events] == [
        *[("log", 8), ("hook", 10)],
        *[("log", 12), ("save", 12), ("hook", 12)],
    ]


@pytest.mark.parametrize("bad_step", [5, 6])
def test_a_loss_that_is_not_finite_stops_before_the_save(bad_step):
    run, events = train(total_steps=12, bad_step=bad_step, log_every=100)
    with pytest.raises(loop.Diverged, match=f"loss is nan at step {bad_step}$"):
        run()
    assert ("save", 6) not in events


def test_a_request_to_stop_saves_first():
    run, events = train(total_steps=12, stop_at=3)
    with pytest.raises(loop.Interrupted, match="step 3"):
        run()
    assert events == [("log", 3, 2.0), ("save", 3)]


def test_a_request_to_stop_after_the_last_step_changes_nothing():
    run, events = train(total_steps=3, stop_at=3)
    assert int(run().step) == 3
    assert ("save", 3) in events


def test_a_finished_run_does_nothing():
    run, events = train(total_steps=3, start=3)
    assert int(run().step) == 3
    assert events == []
