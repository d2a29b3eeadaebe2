r"""Pixel MeanFlow: an image of ImageNet, in pixels and without an autoencoder, by one network call.

    dit-prepare ILSVRC2012_img_train.tar data/imagenet
    dit-train configs/meanflow_pixels.py:B/16 runs/pmf --config.data.path=data/imagenet
    dit-sample runs/pmf grid.png --labels=207,360

Lu et al. 2026, https://arxiv.org/abs/2601.22158; network and settings are those of the authors,
https://github.com/Lyy-iiis/pMF. B/16, L/16 and H/16 have 256x256 pixels, B/32, L/32 and H/32
512x512. Parameters in training and without the velocity's head, multiply-adds of a sample:

    B/16   175,474,304   118,234,240    33.3 G    B/32   179,312,768   120,300,928    33.9 G
    L/16   511,789,696   410,320,768   116.4 G    L/32   516,807,808   412,977,280   117.1 G
    H/16 1,113,259,520   954,956,032   270.2 G    H/32 1,119,752,192   958,497,280   271.1 G

The authors add perceptual losses, LPIPS and features of ConvNeXt-V2, with weights that others
trained. Here are none, so expect a higher FID-50K than their 3.12 for B/16; they give about 9.6
without. This config was not run to its end.
"""

from configs import base, meanflow_improved

DEPTH = {"B": 16, "L": 32, "H": 48}
GUIDANCE = {  # the scale and its times, by the variant, for one network call
    "B/16": (8.5, (0.1, 0.7)),
    "B/32": (6.5, (0.1, 0.7)),
    "L/16": (7.0, (0.2, 0.7)),
    "L/32": (7.5, (0.2, 0.6)),
    "H/16": (7.0, (0.2, 0.6)),
    "H/32": (5.5, (0.1, 0.6)),
}
NOISE_SCALE = {"B/32": 2.0, "L/32": 4.0, "H/16": 2.0, "H/32": 4.0}
HALF_LIFE = {"L/16": 1_000_000}  # of the EMA, in images


def get_config(variant="B/16"):
    config = base.get_config()
    base.set_variant(config, variant, known=GUIDANCE)
    meanflow_improved.set_network(config)
    is_huge = config.model.size == "H"
    config.model.depth = DEPTH[config.model.size]
    config.model.position = "learned_rope"
    config.model.bottleneck = 256 if is_huge else 128
    config.model.input_size = (16 * config.model.patch_size,) * 2
    config.model.in_channels = 3

    meanflow_improved.set_objective(config)
    config.diffusion.prediction = "x0"
    config.diffusion.time_mean = 0.0 if is_huge or variant == "L/32" else 0.8
    config.diffusion.time_std = 0.8
    config.diffusion.uniform_times = 0.1 if is_huge else 0.0
    config.diffusion.noise_scale = NOISE_SCALE.get(variant, 1.0)
    config.diffusion.omega_decay = 2.0 if variant == "L/16" else 1.0

    config.data.space = "pixels"

    config.train.batch_size = 1024
    config.train.optimizer = "muon"
    # Theirs is 1e-3, for updates with a root mean square of 768^-0.5 in B. Here that is 0.2.
    config.train.learning_rate = 1.8e-4  # 1e-3 * 768**-0.5 / 0.2, for L and H as for B
    config.train.b2 = 0.95
    config.train.ema_decay = 0.5 ** (1024 / HALF_LIFE.get(variant, 2_000_000))
    config.train.ema_warmup = True

    config.sampling.omega, config.sampling.omega_interval = GUIDANCE[variant]

    config.run.total_steps = 400_000  # 320 epochs: 320 * 1,281,167 / 1024
    return config
