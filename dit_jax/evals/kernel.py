"""KID, the kernel distance of two sets of features: unbiased, so it is fair for few samples.

Binkowski et al. 2018, https://arxiv.org/abs/1801.01401: the squared maximum mean discrepancy for
the kernel (a.b / D + 1)^3. Shapes: N, M images, D features. Arithmetic is float64.
"""

import numpy as np

from dit_jax.evals.scores import check_count

SUBSET = 1000  # images in a random subset
BLOCK = 2000  # rows and columns of the kernel at a time


def distance(x, y):
    """KID over all pairs of features (N, D) and (M, D), float; below 0 by chance if it is small."""
    check_count("features", x, 2)
    check_count("features", y, 2)
    (n, m), between = (len(x), len(y)), _sum(x, y)
    within = _sum(x, x) - _sum_of_diagonal(x), _sum(y, y) - _sum_of_diagonal(y)
    return float(within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * between / (n * m))


def distances(samples, reference, *, num_subsets=100, size=SUBSET, seed=2020):
    """KID of random subsets, (num_subsets,): their mean and deviation are what others print.

    The subsets are those of torch-fidelity for the same seed.
    """
    check_count("samples", samples, size)
    check_count("reference", reference, size)
    rng, out = np.random.RandomState(seed), []
    for _ in range(num_subsets):
        x = samples[rng.choice(len(samples), size, replace=False)]
        y = reference[rng.choice(len(reference), size, replace=False)]
        out.append(distance(x, y))
    return np.array(out)


def _sum(x, y):
    """The sum of the kernel over all pairs."""
    return sum(_kernel(a @ b.T, x.shape[1]).sum() for a in _blocks(x) for b in _blocks(y))


def _sum_of_diagonal(x):
    return sum(_kernel((a * a).sum(axis=1), x.shape[1]).sum() for a in _blocks(x))


def _kernel(products, size):
    return (products / size + 1) ** 3


def _blocks(x):
    for start in range(0, len(x), BLOCK):
        yield np.asarray(x[start : start + BLOCK], np.float64)
