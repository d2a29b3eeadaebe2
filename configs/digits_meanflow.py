r"""MeanFlow on scikit-learn's digits: each sample is one network call.

    dit-train configs/digits_meanflow.py runs/one-step
    dit-sample runs/one-step samples.png --labels=0-9

Without guidance. To train further with it, which makes the classes clearer and less varied:

    dit-train configs/digits_meanflow.py runs/guided --init_from=runs/one-step \
        --config.diffusion.kappa=0.5 --config.train.learning_rate=1e-3 \
        --config.run.total_steps=600 --config.train.decay_steps=600

Pixel MeanFlow, whose network predicts x0 and takes the scale of guidance when it samples. (This
process has no kappa; 0.5 is its default.)

    dit-train configs/digits_meanflow.py runs/pixel-meanflow \
        --config.diffusion.process=improved_mean_flow --config.diffusion.prediction=x0 \
        --config.diffusion.kappa=0.5 --config.model.velocity_head=true
    dit-sample runs/pixel-meanflow samples.png --labels=0-9 --omega=2

Improved MeanFlow with its authors' blocks, of which the last two exist twice:

    dit-train configs/digits_meanflow.py runs/improved \
        --config.diffusion.process=improved_mean_flow --config.diffusion.kappa=0.5 \
        --config.model.conditioning=in_context_zero --config.model.position=rope_1d \
        --config.model.conditions=h,omega,t_min,t_max,y \
        --config.model.norm=rms --config.model.mlp=swiglu --config.model.qk_norm=true \
        --config.model.velocity_head=true --config.model.head_depth=2
    dit-sample runs/improved samples.png --labels=0-9 --omega=2

The same flags change configs/fashion_meanflow.py.
"""

from configs import base, digits


def get_config(variant="Ti/2"):
    return set_mean_flow(digits.get_config(variant), total_steps=3000)  # 128 epochs


def set_mean_flow(config, total_steps):
    """Turns a config for small pictures into one of MeanFlow."""
    config.diffusion.schedule = base.get_config().diffusion.schedule  # of ddpm only
    config.diffusion.process = "mean_flow"
    config.diffusion.time = "logit_normal"
    config.diffusion.time_mean = -0.4
    config.diffusion.same_times = 0.5
    config.diffusion.kappa = 0.0  # no guidance

    config.sampling.sampler = "euler"
    config.sampling.num_steps = "1"
    config.sampling.clip_x0 = False  # a step is more than its x0
    config.sampling.cfg_scale = 1.0

    config.run.total_steps = config.train.decay_steps = total_steps
    return config
