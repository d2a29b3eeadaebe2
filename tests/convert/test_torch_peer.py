"""The PyTorch baseline of `dit-bench --peer`."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.convert import torch_peer
from dit_jax.diffusion import gaussian, losses, schedules
from dit_jax.models import dit

DIFFUSION = {"schedule": "linear", "num_steps": 1000}
STEPS = np.array([0, 1, 500, 999])


@pytest.mark.parametrize("channels", [3, 6])
def test_peer_has_the_same_loss(channels):
    """With and without a learned variance; step 0 tests the likelihood term."""
    rng, schedule = np.random.default_rng(0), schedules.linear()
    x0 = np.clip(0.5 * rng.standard_normal((4, 4, 4, 3), np.float32), -1, 1)
    noise = rng.standard_normal(x0.shape, np.float32)
    # Close to the noise, because the likelihood of step 0 loses its digits in the tails.
    out = np.concatenate([0.9 * noise, 0.3 * noise], axis=-1)[..., :channels].astype(np.float32)
    x_t = np.asarray(gaussian.q_sample(schedule, x0, STEPS, noise))
    terms = losses.objective(schedule, jnp.asarray(out), x0=x0, x_t=x_t, t=STEPS, noise=noise)

    def to_torch(x):
        return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())

    tables = torch_peer.make_tables(DIFFUSION, torch.device("cpu"))
    loss = torch_peer.objective(
        tables,
        to_torch(out),
        x0=to_torch(x0),
        x_t=to_torch(x_t),
        t=torch.from_numpy(STEPS),
        noise=to_torch(noise),
    )
    assert float(loss) == pytest.approx(float(terms["loss"].mean()), rel=1e-4)


@pytest.mark.slow
def test_peer_loss_decreases():
    model = dit.configure("Ti", 4, input_size=(8, 8), num_classes=5)
    options = {"batch_size": 16, "dtype": "float32", "learning_rate": 1e-3, "ema_decay": 0.99}
    run = torch_peer.make_train_step(model, DIFFUSION, compiled=False, **options)
    losses = [run() for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
