r"""Improved MeanFlow on ImageNet 256x256: one network call for an image, its guidance chosen then.

    dit-train configs/meanflow_improved.py:B/2 runs/imf \
        --config.data.path=data/imagenet --config.data.vae=runs/vae
    dit-sample runs/imf grid.png --vae=runs/vae --labels=207,360

Geng et al. 2025, https://arxiv.org/abs/2512.02012; network and settings are those of the authors,
https://github.com/Lyy-iiis/imeanflow. Data and autoencoder are those of configs/imagenet256.py. The
variants, the parameters in training and without the velocity's head, the multiply-adds of a sample,
and the FID-50K that the authors give for one network call:

    B/2   145,596,960    88,948,256    24.9 G   3.39
    M/2   230,570,016   173,921,312    49.7 G   2.27
    L/2   509,752,352   409,071,648   116.1 G   1.86
    XL/2  711,113,760   610,433,056   174.2 G   1.72

The network is not given the time, only how far it steps. Its conditions are tokens; its last eight
blocks exist twice, for the average velocity and for the velocity, which only training needs. The
scale of guidance and its times are inputs: `--omega` and `--omega_interval` of dit-sample. Training
draws scales of 1 to 8; the authors sample with up to 10.5. This config was not run to its end.
"""

from configs import base

SIZES = {"B/2": ("B", 12), "M/2": ("B", 24), "L/2": ("L", 32), "XL/2": ("L", 48)}  # and the depth
GUIDANCE = {  # the scale and its times for one network call
    "B/2": (8.0, (0.4, 0.65)),
    "M/2": (10.5, (0.4, 0.6)),
    "L/2": (10.5, (0.4, 0.6)),
    "XL/2": (8.0, (0.42, 0.62)),  # two calls: 4 and 0.36 .. 0.64
}


def get_config(variant="B/2"):
    config = base.get_config()
    base.set_variant(config, variant, known=SIZES)
    set_network(config)
    config.model.size, config.model.depth = SIZES[variant]
    config.model.position = "rope_1d"

    set_objective(config)
    config.diffusion.time_mean = -0.4
    config.sampling.omega, config.sampling.omega_interval = GUIDANCE[variant]

    config.train.batch_size = 1024
    config.train.b2 = 0.95
    config.train.warmup_steps = 12_511  # 10 epochs: 10 * 1,281,167 / 1024

    config.run.total_steps = 800_729  # 640 epochs: 640 * 1,281,167 / 1024
    return config


def set_network(config):
    """Sets the authors' blocks, conditions and heads."""
    config.model.conditioning = "in_context_zero"
    config.model.conditions = ("h", "omega", "t_min", "t_max", "y")
    config.model.velocity_head = True
    config.model.head_depth = 8
    config.model.norm = "rms"
    config.model.mlp = "swiglu"
    config.model.qk_norm = True


def set_objective(config):
    """Sets what is learned, how one network call samples, and the arithmetic."""
    config.diffusion.process = "improved_mean_flow"
    config.diffusion.time = "logit_normal"
    config.diffusion.same_times = 0.5

    config.compute.dtype = "float32"  # as the authors; bfloat16: du/dt has an error of 1 %

    config.sampling.sampler = "euler"
    config.sampling.num_steps = "1"
    config.sampling.cfg_scale = 1.0  # omega is the guidance
    config.sampling.cfg_channels = 0
