"""A small DiT on scikit-learn's digits: 1,500 real 8x8 images, no download.

dit-train configs/digits.py runs/digits
"""

from configs import base


def get_config(variant="Ti/2"):
    config = base.get_config()
    base.set_variant(config, variant)
    config.model.input_size = (8, 8)
    config.model.in_channels = 1
    config.model.num_classes = 10

    config.compute.dtype = "float32"  # bfloat16 is slower on a CPU
    config.compute.remat = "full"  # a third faster on a CPU: less memory traffic

    config.diffusion.schedule = "squared_cosine"  # linear destroys an 8x8 image too early

    config.data.source = "digits"
    config.data.space = "pixels"
    config.data.flip = False

    config.train.batch_size = 64
    config.train.learning_rate = 3e-3
    config.train.b2 = 0.99
    config.train.warmup_steps = 100
    config.train.decay_steps = 2000  # = run.total_steps
    config.train.ema_decay = 0.99

    config.sampling.sampler = "ddim"
    config.sampling.num_steps = "ddim25"  # ddim50: twice the time, Frechet distance 0.02 lower
    config.sampling.clip_x0 = True
    config.sampling.cfg_scale = 2.0
    config.sampling.cfg_channels = 0

    config.run.total_steps = 2000  # 85 epochs: 85 * 1500 / 64
    config.run.log_every = 50
    config.run.checkpoint_every = 400
    config.run.sample_every = 500
    config.run.num_samples = 40
    return config
