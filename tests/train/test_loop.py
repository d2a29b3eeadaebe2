import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.train import divergence, loop
from dit_jax.train.state import TrainState


def train(
    *,
    total_steps,
    start=0,
    bad_step=None,
    stop_at=None,
    log_every=4,
    checkpoint_every=6,
    spikes=None,
    failed_saves=(),
    score_every=None,
):
    """(run, events): run() runs the loop with a step that only counts and appends to events."""
    events, failed_saves = [], list(failed_saves)

    def save(step, state, measures, last):
        events.append(("save", step, *measures.values(), last))

    def save_again():
        failed = any(event[0] == "save" and event[1] in failed_saves for event in events)
        failed_saves.clear() if failed else None
        return failed

    def score(step, state):
        events.append(("score", step))
        return {"distance": 10.0 * step}

    def log(step, means, seconds):
        events.append(("log", step, means["loss"], *filter(None, [means.get("distance")])))

    def train_step(state, batch, key):
        assert batch == int(state.step)  # a resumed loop gets the batch of its step
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
            log=log,
            spikes=spikes or divergence.Spikes(0),
            scores=score_every and (score_every, score),
            save=save,
            save_again=save_again,
            hooks=[(5, lambda step, state: events.append(("hook", step)))],
            stop_requested=lambda: ran() == stop_at,
        )

    calls = []

    def ran():
        calls.append(1)
        return start + len(calls)

    return run, events


def test_logs_saves_and_hooks_come_at_their_periods():
    run, events = train(total_steps=12)
    assert int(run().step) == 12
    assert events == [
        ("log", 4, 2.5),  # the mean of 1 .. 4
        ("hook", 5),
        *[("save", 6, 3.5, False), ("log", 6, 5.5)],
        ("log", 8, 7.5),
        ("hook", 10),
        *[("save", 12, 9.5, True), ("log", 12, 10.5), ("hook", 12)],
    ]


def test_scores_come_before_the_save_and_are_in_the_save_and_in_the_log():
    run, events = train(total_steps=10, log_every=100, score_every=3)
    run()
    assert events == [
        *[("score", 3), ("log", 3, 2.0, 30.0)],
        ("hook", 5),
        *[("score", 6), ("save", 6, 3.5, 60.0, False), ("log", 6, 5.0, 60.0)],
        *[("score", 9), ("log", 9, 8.0, 90.0)],
        *[("score", 10), ("save", 10, 8.5, 100.0, True), ("log", 10, 10.0, 100.0), ("hook", 10)],
    ]


def test_a_run_that_must_stop_saves_without_a_score():
    run, events = train(total_steps=10, log_every=100, score_every=3, stop_at=3)
    with pytest.raises(loop.Interrupted):
        run()
    assert events == [("save", 3, 2.0, True), ("log", 3, 2.0)]


def test_a_resumed_run_keeps_the_periods():
    run, events = train(total_steps=12, start=7)
    run()
    assert [e[:2] for e in events] == [
        *[("log", 8), ("hook", 10)],
        *[("save", 12), ("log", 12), ("hook", 12)],
    ]


@pytest.mark.parametrize("bad_step", [5, 6])
def test_a_loss_that_is_not_finite_raises_before_the_save(bad_step):
    run, events = train(total_steps=12, bad_step=bad_step, log_every=100)
    with pytest.raises(divergence.Diverged, match=f"loss is nan at step {bad_step}$") as error:
        run()
    assert error.value.step == bad_step
    assert not any(event[0] in ("log", "save") for event in events)


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_a_spike_raises_before_the_log_and_the_save(log_every):
    spikes = divergence.Spikes(1.9, [3.0] * 30)
    run, events = train(total_steps=12, log_every=log_every, spikes=spikes)
    with pytest.raises(divergence.Diverged, match="loss 6 is above 1.9 times 3, .* step 6$") as e:
        run()
    assert e.value.step == 6 and not any(event[0] == "save" for event in events)
    assert all(event[1] < 6 for event in events)


def test_a_failed_save_is_repeated_at_the_next_log():
    run, events = train(total_steps=20, checkpoint_every=10, log_every=4, failed_saves=[10])
    run()
    saves = [event[1:] for event in events if event[0] == "save"]
    assert saves == [(10, 5.5, False), (12, 11.5, False), (20, 16.5, True)]


def test_a_stop_request_saves_and_raises_interrupted():
    run, events = train(total_steps=12, stop_at=3)
    with pytest.raises(loop.Interrupted, match="stopped after step 3"):
        run()
    assert events == [("save", 3, 2.0, True), ("log", 3, 2.0)]


def test_a_stop_request_in_the_last_step_is_ignored():
    run, events = train(total_steps=3, stop_at=3)
    assert int(run().step) == 3
    assert ("save", 3, 2.0, True) in events


def test_a_finished_run_does_nothing():
    run, events = train(total_steps=3, start=3)
    assert int(run().step) == 3
    assert events == []


class Async:
    """A loss that the devices have computed once it was waited for."""

    def __init__(self, step, in_flight):
        self.step, self.in_flight = step, in_flight

    def block_until_ready(self):
        self.in_flight[:] = [step for step in self.in_flight if step > self.step]
        return self

    def __array__(self, *_, **__):
        return np.asarray(self.block_until_ready().step, np.float32)


def test_at_most_two_steps_are_in_flight():
    in_flight, most = [], []

    def train_step(state, batch, key):
        in_flight.append(batch + 1)
        most.append(len(in_flight))
        return state._replace(step=batch + 1), {"loss": Async(batch + 1, in_flight)}

    loop.run(
        TrainState(0, None, None, None),
        train_step,
        iter(range(100)),
        None,
        total_steps=20,
        log_every=9,
        checkpoint_every=100,
        log=lambda *_: None,
        spikes=divergence.Spikes(0),
        scores=None,
        save=lambda *_: None,
        save_again=lambda: False,
        hooks=[],
        stop_requested=lambda: False,
    )
    assert max(most) == 2
