"""A small DiT on Fashion-MNIST: 60,000 grey pictures of clothes, 28x28 pixels, 10 classes.

    bash launch/fashion.sh

It downloads the data set and trains. With the four IDX files in a folder:

    dit-train configs/fashion.py runs/fashion --config.data.path=FOLDER
"""

from configs import base


def get_config(variant="Ti/7"):
    config = base.get_config()
    base.set_variant(config, variant)
    config.model.input_size = (28, 28)
    config.model.in_channels = 1
    config.model.num_classes = 10

    config.compute.dtype = "float32"  # bfloat16 is slower on a CPU
    config.compute.remat = "full"  # a third faster on a CPU: less memory traffic

    config.data.source = "fashion"
    config.data.space = "pixels"
    config.data.path = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
    config.data.flip = False  # all shoes point to the left

    config.train.batch_size = 64
    config.train.learning_rate = 3e-3
    config.train.b2 = 0.99
    config.train.warmup_steps = 100
    config.train.decay_steps = 6000  # = run.total_steps
    config.train.ema_decay = 0.995

    config.sampling.sampler = "ddpm"
    config.sampling.num_steps = "50"
    config.sampling.clip_x0 = True
    config.sampling.cfg_scale = 2.0
    config.sampling.cfg_channels = 0

    config.run.total_steps = 6000  # 6.4 epochs: 6.4 * 60,000 / 64
    config.run.log_every = 50
    config.run.checkpoint_every = 1000
    config.run.sample_every = 1000
    config.run.num_samples = 40
    return config
