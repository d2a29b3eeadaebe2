"""The autoencoder of Stable Diffusion in its original format, made from one of diffusers."""

import re

NAMES = (  # (pattern in diffusers' name, original name)
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def original(state_dict, *, prefix=""):
    """The state dict with original names: 1x1 convolutions in the attention, levels of the decoder
    counted from the finest. Arrays or tensors."""
    levels = len({name.split(".")[2] for name in state_dict if ".up_blocks." in name})
    out = {}
    for name, x in state_dict.items():
        name = re.sub(r"(?<=up_blocks\.)\d+", lambda level: str(levels - 1 - int(level[0])), name)
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        is_projection = ".attn_1." in name and x.ndim == 2
        out[prefix + name] = x[:, :, None, None] if is_projection else x
    return out
