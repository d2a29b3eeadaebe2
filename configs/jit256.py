r"""JiT: a plain transformer on the pixels of ImageNet 256x256, without an autoencoder.

    dit-prepare ILSVRC2012_img_train.tar data/imagenet
    dit-train configs/jit256.py:B/16 runs/jit-b16 --config.data.path=data/imagenet

Li & He 2025, https://arxiv.org/abs/2511.13720. Variants, with parameters and multiply-adds:

    B/16   131,123,712    25.2 G     H/16     952,514,368   181.9 G
    L/16   458,877,664    87.9 G     G/16   2,007,130,000   383.7 G

Its FID-50K, with guidance: B/16 4.37 after 200 epochs; H/16 1.86 and G/16 1.82 after 600. Others
got 4.69 and 4.72 for B/16 with a scale of 2.9 (issue 56 of github.com/LTH14/JiT): sweep `cfg_scale`
and the decay of the EMA (.9996 to .9999), as the paper does. The authors' H and G train with
dropout 0.2 in the middle half of their blocks, and these models have none. This config was not run
to its end.

512x512 with as many tokens: B/32 with --config.model.input_size=512,512 and
--config.diffusion.noise_scale=2 (the image size / 256).
"""

from configs import base

SIZES = {  # bottleneck, and the block before which the class tokens join
    "B": (128, 4),
    "L": (128, 8),
    "H": (256, 10),
    "G": (256, 10),
}


def get_config(variant="B/16"):
    config = base.get_config()
    base.set_variant(config, variant, known=[f"{size}/{p}" for size in SIZES for p in (16, 32)])
    set_parts(config)
    set_objective(config)
    config.model.bottleneck, config.model.class_tokens_from = SIZES[config.model.size]
    config.model.class_tokens = 32
    config.model.input_size = (256, 256)
    config.model.in_channels = 3

    config.data.space = "pixels"

    config.train.batch_size = 1024
    config.train.learning_rate = 2e-4  # 5e-5 * 1024 / 256
    config.train.b2 = 0.95
    config.train.warmup_steps = 6_256  # 5 epochs: 5 * 1,281,167 / 1024

    config.sampling.cfg_scale = 2.9 if config.model.size == "B" else 2.2  # of its README: B, H

    config.run.total_steps = 750_000  # 600 epochs: 600 * 1,281,167 / 1024
    return config


def set_parts(config):
    """Sets the parts of JiT's blocks; not the bottleneck and the class tokens."""
    config.model.norm = "rms"
    config.model.mlp = "swiglu"
    config.model.position = "rope"
    config.model.qk_norm = True


def set_objective(config):
    """Sets what JiT learns, x0 with the loss of the velocity, and how it samples."""
    config.diffusion.process = "linear"
    config.diffusion.prediction = "x0"
    config.diffusion.weight = "velocity"
    config.diffusion.time = "logit_normal"
    config.diffusion.time_mean = 0.8  # JiT: -0.8, because its t is 1 for data
    config.diffusion.time_std = 0.8
    config.diffusion.time_scale = 1.0
    config.diffusion.reverse_time = True  # the network gets JiT's t

    config.sampling.sampler = "heun"
    config.sampling.num_steps = "50"  # 99 network calls
    config.sampling.cfg_channels = 0
    config.sampling.cfg_interval = (0.0, 0.9)  # JiT: 0.1 to 1 of its t
