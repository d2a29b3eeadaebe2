r"""A small JiT on Fashion-MNIST: the parts and the objective of configs/jit256.py on 28x28 pixels.

    bash launch/pixels.sh

It downloads the data set and compares this model with the paper's block, and predicting x0 with
predicting noise. One model, with the four IDX files in a folder:

    dit-train configs/pixels.py:Ti/7 runs/pixels --config.data.path=FOLDER

On digits, with the parts of configs/jit256.py as flags:

    dit-train configs/digits.py runs/jit-digits --config.model.norm=rms --config.model.mlp=swiglu \
        --config.model.position=rope --config.model.qk_norm=true --config.diffusion.process=linear \
        --config.diffusion.prediction=x0 --config.diffusion.weight=velocity
"""

from configs import jit256, scaling


def get_config(variant="Ti/7"):
    config = scaling.get_config(variant)
    jit256.set_parts(config)
    jit256.set_objective(config)
    config.model.bottleneck = config.model.patch_size**2 // 3  # 16 of 49 numbers; JiT: 128 of 768
    config.model.class_tokens = 4  # a quarter of 16 patches; JiT: 32 of 256
    config.model.class_tokens_from = 1
    config.diffusion.time_mean = 0.0  # few pixels need less noise than 256x256

    config.sampling.num_steps = "25"  # 49 network calls
    config.sampling.clip_x0 = False  # as JiT
    config.sampling.cfg_interval = (0.0, 1.0)
    return config
