"""MeanFlow: a network of the average velocity, with which one step is a sample.

Geng et al. 2025 (https://arxiv.org/abs/2505.13447). Along the linear path x moves from time t to
r <= t by -(t - r) u. The network learns u(x_t, t, h), the mean of the velocity v over the times
r .. t, with h = t - r; for h = 0 it is v. The derivative along the path gives an identity to learn:

    u = v - (t - r) du/dt

One jvp of the network gives u and du/dt. t and h reach the network in 0 .. 1: in thousands, du/dt
would be far larger than u. Guidance is part of the training, so a sample is one call of the network
for each step. Shapes: N batch, C channels.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dit_jax.diffusion import flow, losses, times
from dit_jax.diffusion.process import Passes

UNIFORM = 2  # of a key's stream for uniform times; `split` takes 0 and 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageVelocity(flow.Flow):
    """What the two objectives share, as a `process.Process`.

    A loss takes as its t the dict of `draw_time`. same_times: the share of examples with r = t,
    which learn v. The squared error s of an example, summed, has the weight 1 / (s +
    adaptive_eps)^adaptive_power: for the power 1 all losses are about 1, and "mse" says more.
    uniform_times: the share of examples whose two times are uniform, not of `draw`.
    """

    path: str = "linear"
    time_scale: float = 1.0
    least_steps: ClassVar[int] = 1
    same_times: float = 0.75
    uniform_times: float = 0.0
    adaptive_power: float = 1.0
    adaptive_eps: float = 0.01

    def draw_time(self, key, shape):
        """{"t", "r"}, each (N,)."""
        one, two = (times.draw(self.draw, each, shape) for each in jax.random.split(key))
        if self.uniform_times:
            key = jax.random.fold_in(key, UNIFORM)
            chance, *uniform = jax.random.uniform(key, (3, *shape), jnp.float32)
            is_uniform = chance < self.uniform_times
            one, two = (
                jnp.where(is_uniform, *pair) for pair in zip(uniform, (one, two), strict=True)
            )
        return self.pair(one, two)

    def pair(self, one, two):
        """{"t", "r"}: the larger and the smaller of two times (N,), the same on the first rows.

        These have the larger one; with the prediction "x0", as the authors' code, the first one.
        """
        is_same = jnp.arange(len(one)) < int(self.same_times * len(one))
        if self.prediction == "x0":
            two = jnp.where(is_same, one, two)
        t, r = jnp.maximum(one, two), jnp.minimum(one, two)
        return {"t": t, "r": jnp.where(is_same, t, r)}

    def inputs(self, t, end):
        return {"h": t - end}

    @property
    def clips_velocity(self):
        return self.prediction == "x0"

    def velocity(self, network, x, t, **given):
        """The velocities (N, ..., C or 2C) that the network's output says at x and t (N,)."""
        out = network(x, t, **given)
        if self.prediction == "x0":
            heads = jnp.split(out, out.shape[-1] // x.shape[-1], axis=-1)
            return jnp.concatenate([_velocity_of(x0, x, t) for x0 in heads], axis=-1)
        return -out if self.reverse_time else out  # SiT's has the other sign

    def noisy(self, x0, t, noise):
        """(x_t, its velocity), both like x0, for times t (N,)."""
        x_t = self.corrupt(x0, t, noise)
        if self.prediction == "x0":
            return x_t, _velocity_of(x0, x_t, t)
        return x_t, self.noise_scale * noise - x0

    def differentiate(self, network, x_t, t, r, slope, **given):
        """(out, d out / dt) of the network at (x_t, t, t - r), where x_t moves by `slope`."""

        def average(x, t):
            return self.velocity(network, x, t, h=t - r, **given)

        return jax.jvp(average, (x_t, t), (slope, jnp.ones_like(t)))

    def adaptive(self, error):
        """(N, ..., C) -> (N,): the squared error with its weight."""
        square = jnp.square(error).sum(axis=tuple(range(1, error.ndim)))
        weight = (square + self.adaptive_eps) ** self.adaptive_power
        return square / jax.lax.stop_gradient(weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow(AverageVelocity):
    """A `process.Process`: MeanFlow, whose guidance has a fixed scale.

    At the times omega_interval it learns omega v + (1 - omega - kappa) u(null) + kappa u(label) in
    place of v, with h = 0 in both u. That is guidance with the scale omega / (1 - kappa).
    """

    omega: float = 1.0
    kappa: float = 0.0
    omega_interval: tuple = (0.0, 1.0)

    @property
    def passes(self):
        return Passes(forwards=int(self.is_guided) + bool(self.kappa), tangents=1)

    @property
    def is_guided(self):
        return (self.omega, self.kappa) != (1, 0)

    def losses(self, network, x0, t, noise):
        """{"loss", "mse"}: the squared error of u, with and without its weight."""
        t, r = t["t"], t["r"]
        x_t, v = self.noisy(x0, t, noise)
        v = self.guide(network, x_t, t, v)
        u, change = self.differentiate(network, x_t, t, r, v)
        target = jax.lax.stop_gradient(v - _beside(jnp.clip(t - r, 0, 1), v) * change)
        return {"loss": self.adaptive(u - target), "mse": losses.mean_square(u - target)}

    def guide(self, network, x_t, t, v):
        """v, guided by what the network predicts now; examples without a label keep v."""
        if not self.is_guided:
            return v
        null = self.velocity(network._replace(dropped=True), x_t, t)
        guided = self.omega * v + (1 - self.omega - self.kappa) * null
        if self.kappa:
            guided += self.kappa * self.velocity(network._replace(dropped=False), x_t, t)
        first, last = self.omega_interval
        is_guided = (first <= t) & (t <= last) & jnp.logical_not(network.dropped)
        return jax.lax.stop_gradient(jnp.where(_beside(is_guided, v), guided, v))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlow(AverageVelocity):
    """A `process.Process`: improved MeanFlow (Geng et al. 2025, https://arxiv.org/abs/2512.02012).

    The error is one of v, in which x_t moves by the velocity that the network predicts; and the
    scale of the guidance and the times t_min .. t_max that it holds for are conditions. Training
    draws scales of 1 .. omega_max, with the density omega^-omega_decay. The velocity is u for h = 0
    or, of a network with 2C channels, its second half: another head, which learns v.

    With the prediction "x0" it is pixel MeanFlow (Lu et al. 2026, https://arxiv.org/abs/2601.22158)
    without its perceptual losses, which need networks that others trained: both heads give an x0,
    and their velocity is (x_t - x0) / max(t, CLIP).
    """

    omega_max: float = 8.0
    omega_decay: float = 1.0

    @property
    def passes(self):
        return Passes(forwards=2, tangents=1)

    def draw_time(self, key, shape):
        """{"t", "r", "omega", "t_min", "t_max"}, each (N,)."""
        key, omega_key, interval_key = jax.random.split(key, 3)
        drawn = super().draw_time(key, shape)
        low, high = jax.random.uniform(interval_key, (2, *shape), jnp.float32) / 2
        is_same = drawn["r"] == drawn["t"]
        return drawn | {
            "omega": self.scale(jax.random.uniform(omega_key, shape, jnp.float32)),
            "t_min": jnp.where(is_same, 0, low),
            "t_max": jnp.where(is_same, 1, 0.5 + high),
        }

    def scale(self, uniform):
        """The scale omega of a uniform random number."""
        if self.omega_decay == 1:
            return self.omega_max**uniform
        power = 1 - self.omega_decay
        return (1 + uniform * (self.omega_max**power - 1)) ** (1 / power)

    def inputs(self, t, end):
        """Without guidance, unless a caller gives a scale."""
        return {"h": t - end, "omega": 0 * t + 1, "t_min": 0 * t, "t_max": 0 * t + 1}

    def losses(self, network, x0, t, noise):
        """{"loss", "mse"}: the squared errors of v, with and without their weight."""
        given = dict(t)
        t, r = given.pop("t"), given.pop("r")
        (x_t, v), channels = self.noisy(x0, t, noise), x0.shape[-1]
        is_guided = (given["t_min"] <= t) & (t <= given["t_max"])
        slope, v = self.guide(network, x_t, t, v, jnp.where(is_guided, given["omega"], 1))
        out, change = self.differentiate(network, x_t, t, r, slope, **given)
        change = jax.lax.stop_gradient(change[..., :channels])
        error = out[..., :channels] + _beside(t - r, v) * change - v
        terms = {"loss": self.adaptive(error), "mse": losses.mean_square(error)}
        if out.shape[-1] > channels:  # two heads
            terms["loss"] += self.adaptive(out[..., channels:] - v)
        return terms

    def guide(self, network, x_t, t, v, omega):
        """(the velocity that the network predicts, v guided by scales omega (N,))."""
        channels = v.shape[-1]
        kept, null = (
            self.velocity(network._replace(dropped=each), x_t, t, **given)[..., -channels:]
            for each, given in ((False, {"omega": omega}), (True, {}))
        )
        guided = v + _beside(1 - 1 / omega, v) * (kept - null)
        dropped = jnp.broadcast_to(network.dropped, t.shape)
        guided = jnp.where(_beside(dropped, v), v, guided)
        return jax.lax.stop_gradient((kept, guided))


def _velocity_of(x0, x, t):
    """(x - x0) / max(t, CLIP), the velocity of x if its data are x0, at t (N,)."""
    return (x - x0) / _beside(jnp.maximum(t, flow.CLIP), x)


def _beside(values, x):
    """values (N,) shaped to multiply x (N, ..., C)."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
