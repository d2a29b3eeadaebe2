"""Detects divergence: metrics that are not finite, and spikes of the loss."""

import math
import statistics

WINDOW = 100  # how many losses a new one is compared with
FEWEST = 20  # the check starts with so many losses


class Diverged(Exception):
    """Training has diverged; the message says how. step: where it was detected."""

    def __init__(self, message, step):
        super().__init__(message)
        self.step = step


def check_finite(metrics, step):
    """Raises Diverged if a metric {name: value} of a step is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is {value} at step {step}", step)


class Spikes:
    """Raises Diverged if the loss of a step is above `factor` times the median of the last ones.

    factor 0: never. losses: of the steps before, oldest first. name: of the metric that is meant,
    where the loss says nothing.
    """

    def __init__(self, factor, losses=(), name="loss"):
        self.factor, self.losses, self.name = factor, list(losses), name

    def check(self, loss, step):
        if self.factor and len(self.losses) >= FEWEST:
            usual = statistics.median(self.losses)
            if loss > self.factor * usual:
                raise Diverged(
                    f"{self.name} {loss:.4g} is above {self.factor:g} times {usual:.4g}, the "
                    f"median of the last {len(self.losses)}, at step {step}",
                    step,
                )
        self.losses = [*self.losses, loss][-WINDOW:]
