"""Corrects diffusers' DiTPipeline, so that it computes DiT. Needs diffusers and PyTorch.

diffusers differs from the official code in five points: its time frequencies divide by 127 instead
of 128; the second LayerNorm of a block has epsilon 1e-5; it drops the learned variance; it guides
all channels; its null class is 1000 for any number of classes.
"""

import torch
from diffusers import DiTPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn

from dit_jax.convert import diffusers_dit, torch_model
from dit_jax.errors import UserError


def match_official(pipeline):
    """Returns an `OfficialDiTPipeline` with the same transformer, scheduler and VAE.

    Corrects the transformer in place.
    """
    if not isinstance(pipeline, DiTPipeline):
        raise UserError(f"pipeline must be a DiTPipeline, got {type(pipeline).__name__}")
    diffusers_dit.read_diffusion(pipeline.scheduler.config)
    match_transformer(pipeline.transformer)
    official = OfficialDiTPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler)
    official.labels = dict(pipeline.labels)
    return official


def match_transformer(transformer):
    """Corrects the time frequencies and the epsilon of a DiTTransformer2DModel, in place."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return transformer


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class AsDiT(nn.Module):
    """Gives a DiTTransformer2DModel the interface of `torch_model.DiT`."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer, config = transformer, transformer.config
        self.in_channels, self.num_classes = config.in_channels, config.num_embeds_ada_norm
        self.input_size, self.null_label = (config.sample_size, config.sample_size), True

    @property
    def pos_embed(self):
        return self.transformer.pos_embed.proj.weight  # on the device of the model

    def forward(self, x, t, y):
        x = x.to(self.transformer.dtype)
        return self.transformer(x, timestep=t, class_labels=y).sample


class OfficialDiTPipeline(DiTPipeline):
    """Samples like the official `sample.py`: DDPM, learned variance, three guided channels."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels,
        guidance_scale=4.0,
        num_inference_steps=250,
        seed=0,
        guidance_channels=3,
        output_type="pil",
        noise=None,
    ):
        """Returns one image for each label: PIL, "np", "pt", or "latent" for no decoding.

        noise (S + 1, N, C, H, W) replaces the noise of the seed; see `torch_model.Sampler`.
        """
        if output_type not in OUTPUT_TYPES:
            kinds = ", ".join(OUTPUT_TYPES)
            raise UserError(f"output_type must be one of {kinds}, got {output_type!r}")
        if self.vae is None and output_type != "latent":
            raise UserError(f"output_type must be latent if vae is None, got {output_type!r}")
        channels = self.transformer.config.in_channels
        if guidance_channels not in range(channels + 1):
            raise UserError(
                f"guidance_channels must be in 0 .. {channels}, got {guidance_channels}"
            )
        diffusion = diffusers_dit.read_diffusion(self.scheduler.config)
        config = {
            "space": "latents",
            "diffusion": diffusion,
            "sampling": {
                "sampler": "ddpm",
                "num_steps": num_inference_steps,
                "eta": 0.0,
                "clip_x0": self.scheduler.config.get("clip_sample", False),
                "cfg_scale": guidance_scale,
                "cfg_channels": guidance_channels,
                "cfg_interval": (0, diffusion["num_steps"] - 1),
            },
        }
        sampler = torch_model.Sampler(AsDiT(self.transformer), config)
        latents = sampler.sample(class_labels, seed=seed, noise=noise)
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = self.vae.decode(latents).sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images)
