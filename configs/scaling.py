"""The scaling study of the paper (sec. 5) on Fashion-MNIST: sizes Pi, Na, Ti, XS, patches 7, 4, 2.

    bash launch/scaling.sh

It downloads the data set, trains the models, scores and plots them. One model, with the four IDX
files in a folder:

    dit-train configs/scaling.py:Ti/4 runs/ti4 --config.data.path=FOLDER

As in the paper, all models have the same batches, learning rate, number of steps and seed.
The largest costs 330 times the Gflops of the smallest (paper: S/8 to XL/2, 330 times).
"""

from configs import fashion


def get_config(variant="Ti/4"):
    config = fashion.get_config(variant)
    config.train.learning_rate = 1e-3
    config.train.decay_steps = 0  # a constant rate: no step of the score curves is special

    config.sampling.num_steps = "ddim25"
    config.sampling.cfg_scale = 1.0  # the paper compares sizes without guidance

    config.run.total_steps = 2000  # 2.1 epochs: 2.1 * 60,000 / 64
    config.run.checkpoint_every = 500  # each of them is scored
    config.run.keep_checkpoints = 1000  # all
    return config
