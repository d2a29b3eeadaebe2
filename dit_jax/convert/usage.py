"""How a model on the Hugging Face hub is sampled, as the Markdown of its card."""

from dit_jax.convert import diffusers_dit
from dit_jax.errors import UserError

ANY = "NAMESPACE/NAME"  # of a repository that is not known yet
SCALE = "the scale of the autoencoder (0.18215 for Stable Diffusion's)"


def write(model, space, name, repository):
    """Returns the text for a DiTConfig: here, in PyTorch and in diffusers.

    space: "pixels" or "latents". name: of the folders in the commands. repository: "" if unknown.
    """
    labels = list(dict.fromkeys(i % model.num_classes for i in (3, 1, 4)))
    parts = [_here, _in_pytorch, _in_diffusers]
    return "\n\n".join(part(model, space, name, repository or ANY, labels) for part in parts)


def _here(model, space, name, repository, labels):
    lines, option = [f"dit-convert pull {repository} {name}"], ""
    if space == "latents":
        lines += ["dit-convert vae vae --from_hub=stabilityai/sd-vae-ft-ema  # or your own"]
        option = " --vae=vae"
    lines += [f"dit-sample {name} grid.png --labels={','.join(map(str, labels))}{option}"]
    code = "\n".join(lines)
    return (
        f"With dit_jax, which must be installed with its extra `convert`:\n\n```bash\n{code}\n```"
    )


def _in_pytorch(model, space, name, repository, labels):
    count, note = len(labels), ""
    if space == "pixels":
        sample = f"images = dit.load(folder).sample({labels})"
        returns = f"uint8 {(count, *model.input_size, model.in_channels)}"
    else:
        sample = f"latents = dit.load(folder).sample({labels})"
        returns = f"{(count, model.in_channels, *model.input_size)}, in model units"
        note = f"\n\nDivide the latents by {SCALE} before you decode them."
    return f"""With PyTorch, `safetensors` and `huggingface_hub`, but without dit_jax.
It runs `dit.py` of this repository:

```python
import sys

from huggingface_hub import snapshot_download

folder = snapshot_download("{repository}")
sys.path.insert(0, folder)
import dit

{sample}  # {returns}
```{note}"""


def _in_diffusers(model, space, name, repository, labels):
    reason = None
    if space == "pixels":
        reason = "`DiTPipeline` decodes latents, and this model generates pixels"
    try:
        diffusers_dit.check(model)
    except UserError as error:
        reason = str(error)
    if reason:
        return f"With diffusers: not possible. {reason[0].upper()}{reason[1:]}."
    return f"""With diffusers, after a conversion. `VAE` is a folder with diffusers' AutoencoderKL:

```bash
dit-convert pull {repository} {name}
dit-convert to-diffusers {name} {name}_pipeline --vae=VAE
```

```python
from diffusers import DiTPipeline

from dit_jax.convert.diffusers_pipeline import match_official

pipeline = match_official(DiTPipeline.from_pretrained("{name}_pipeline"))
images = pipeline({labels}).images
```"""
