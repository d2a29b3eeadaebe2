"""Writes the model card of a checkpoint: a README.md in the format of the Hugging Face hub.

It says what the checkpoint and the receipts of dit-evaluate record, and names what they do not.
"""

import math
import re
from typing import Any, NamedTuple

from dit_jax import settings as settings_lib
from dit_jax.convert import describe, files, parity, receipts, usage
from dit_jax.diffusion import fields as diffusion_fields
from dit_jax.machine import words
from dit_jax.models import dit, flops
from dit_jax.sampling import fields, imagenet

TASK = "unconditional-image-generation"  # the hub has no task for images of a class
TAGS = ["dit", "diffusion-transformer", "class-conditional", "image-generation", "jax", "pytorch"]
METRICS = {"FID": "fid", "sFID": "sfid", "Inception Score": "inception_score"}  # the hub's names
MAX_NAMES = 30  # names of classes that a card lists
OFFICIAL_LICENCE = "CC BY-NC 4.0, which forbids commercial use"


class Source(NamedTuple):
    """A data set that the package knows: its name, licence and data set of the hub."""

    name: str
    licence: str
    dataset: str | None = None


OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the kernels of the blocks, else Adam"}
SOURCES = {  # data.source
    "digits": Source("the UCI handwritten digits, as scikit-learn has them", "CC BY 4.0"),
    "fashion": Source("Fashion-MNIST (Xiao et al. 2017)", "MIT", "zalando-datasets/fashion_mnist"),
}


class Subject(NamedTuple):
    """What a card is about.

    meta: of the step. weights: "ema" or "params". repository: NAMESPACE/NAME on the hub, "" if
    unknown. licence, datasets: as the hub names them; "" and () if unknown. report: of the parity
    check, None if there was none.
    """

    model: dit.DiTConfig
    settings: settings_lib.Settings
    meta: dict[str, Any]
    weights: str
    receipts: list
    repository: str = ""
    licence: str = ""
    datasets: tuple = ()
    report: dict | None = None

    @property
    def name(self):
        """Of the repository; without one, a name that a folder can have."""
        variant = re.sub("[^A-Za-z0-9]+", "-", self.model.name)
        return self.repository.partition("/")[2] or f"DiT-{variant}"

    @property
    def class_names(self):
        return fields.class_names(self.meta)

    @property
    def training(self):
        """The Settings of the run, None for a checkpoint that was converted."""
        config = self.meta["config"]
        return settings_lib.read(config) if "train" in config else None

    @property
    def source(self):
        """The Source of the data, None if the package does not know it."""
        return SOURCES.get(self.settings.data.source)


def write(subject):
    """Returns the text of a card."""
    sections = {
        "": _introduce(subject),
        "Intended use": _intend(subject),
        "Sampling": usage.write(
            subject.model, subject.settings.data.space, subject.name, subject.repository
        ),
        "Model": _table(_describe_model(subject)),
        "Data": _describe_data(subject),
        "Training": _describe_training(subject),
        "Scores": _show_scores(subject),
        "Licence": _show_licence(subject),
        "What is not known": "\n".join(f"- {each}" for each in _unknown(subject)),
    }
    body = "\n\n".join(f"## {name}\n\n{text}" if name else text for name, text in sections.items())
    return f"---\n{_front_matter(subject)}\n---\n\n{body}\n"


def _front_matter(subject):
    hub = files.require("huggingface_hub")
    datasets = list(subject.datasets)
    if not datasets and subject.source and subject.source.dataset:
        datasets = [subject.source.dataset]
    name = subject.source.name if subject.source else "the training data"
    results = [
        hub.EvalResult(
            task_type=TASK,
            dataset_type=datasets[0] if datasets else subject.settings.data.source,
            dataset_name=datasets[0] if subject.datasets else name,
            metric_type=_metric(score.name),
            metric_name=score.name,
            metric_value=score.value,
        )
        for receipt in subject.receipts
        for score in receipt.scores
        if math.isfinite(score.value)
    ]
    data = hub.ModelCardData(
        license=subject.licence or "unknown",
        library_name="dit_jax",
        pipeline_tag=TASK,
        tags=TAGS,
        datasets=datasets or None,
        model_name=subject.name,
        eval_results=results or None,
    )
    return data.to_yaml()


def _metric(name):
    known = METRICS.get(name) or METRICS.get(name.partition("-")[0])
    return known or re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def _introduce(subject):
    model = subject.model
    shape = " x ".join(map(str, model.input_size))
    pixels = subject.settings.data.space == "pixels"
    what = f"images of {shape} pixels" if pixels else f"latents of {shape}"
    names = f": {_list_names(subject.class_names)}" if subject.class_names else ""
    if subject.class_names == imagenet.names():
        names = f", those of ImageNet{names}"
    return (
        f"# {subject.name}\n\n"
        f"A Diffusion Transformer ([Peebles & Xie 2023](https://arxiv.org/abs/2212.09748)), "
        f"DiT-{model.name}. It generates {what} with "
        f"{words.count(model.in_channels, 'channel')} of "
        f"{words.count(model.num_classes, 'class', 'classes')}{names}."
    )


def _list_names(names):
    shown = ", ".join("`" + name.replace("`", "'") + "`" for name in names[:MAX_NAMES])
    more = len(names) - MAX_NAMES
    return f"{shown} and {more} more (`class_names` in `config.json`)" if more > 0 else shown


def _intend(subject):
    data = subject.source.name if subject.source else "its training data"
    return (
        f"Research and teaching. The model generates images that resemble {data}. No other use was "
        "tested. Do not take its images for photographs or measurements, and do not base decisions "
        "about people on them."
    )


def _table(rows):
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _describe_model(subject):
    model, diffusion = subject.model, subject.settings.diffusion
    sampling = subject.settings.sampling
    null = ", and a null label for guidance" if model.null_label else ", without a null label"
    is_learned = model.learn_sigma and not diffusion_fields.is_path(diffusion)
    learned = ", and the variance" if is_learned else ""
    shape = " x ".join(map(str, (*model.input_size, model.in_channels)))
    rows = {
        "size": f"{model.depth} blocks, hidden size {model.hidden_size}, "
        f"{model.num_heads} heads, patch {model.patch_size}",
        "conditioning": model.conditioning,
        "parts": ", ".join(f"{name} {value}" for name, value in model.parts.items()),
        "input": f"{shape}, {subject.settings.data.space}",
        "classes": f"{model.num_classes:,}{null}",
        "parameters": f"{describe.count_parameters(model)}, float32",
        "forward pass": f"{flops.multiply_adds(model) / 1e9:.3g} Gflops (multiply-adds)",
        "diffusion": f"{_name_process(diffusion)}; predicts the {diffusion.prediction}{learned}",
        "default sampling": receipts.show_sampling(settings_lib.to_json(sampling)),
    }
    if not model.parts:
        del rows["parts"]
    if subject.report and subject.report["passed"]:
        error = parity.text(subject.report["relative"])
        rows["PyTorch"] = f"agrees with JAX to a relative error of {error} (`parity.json`)"
    return rows


def _name_process(diffusion):
    if diffusion_fields.is_path(diffusion):
        names = {"mean_flow": "MeanFlow", "improved_mean_flow": "improved MeanFlow"}
        return names.get(diffusion.process, f"{diffusion.process} path of flow matching")
    return f"{diffusion.schedule} schedule of {diffusion.num_steps:,} steps"


def _describe_data(subject):
    data, sha256 = subject.settings.data, subject.meta.get("data_sha256")
    sentences = []
    if subject.source:
        sentences += [f"The model was trained on {subject.source.name}."]
    elif subject.training:
        sentences += [f"The model was trained on its author's own data ({data.source})."]
    else:
        sentences += ["The checkpoint does not record its data."]
    if subject.datasets:
        links = [f"[{each}](https://huggingface.co/datasets/{each})" for each in subject.datasets]
        sentences += [f"The author names {', '.join(links)}."]
    if data.classes:
        sentences += [f"Only the classes {', '.join(map(str, data.classes))} were used."]
    if subject.training:
        flipped = "half of them flipped in every epoch" if data.flip else "not flipped"
        sentences += [f"Split `{data.split}`; images {flipped}."]
    if sha256:
        sentences += [f"sha256 of the data, as dit_jax computes it: `{sha256}`."]
    return " ".join(sentences)


def _describe_training(subject):
    settings, meta = subject.training, subject.meta
    if not settings:
        origin = meta.get("pulled")
        if not origin:
            return "Not recorded: the checkpoint was converted from another format."
        name, commit = origin["repository"], origin["commit"]
        return (
            f"Not recorded here: the checkpoint was pulled from "
            f"[{name}](https://huggingface.co/{name}/tree/{commit}), whose card may say more."
        )
    train = settings.train
    decay = f", then to 0 until step {train.decay_steps:,}" if train.decay_steps else ""
    rows = {
        "weights": f"{_name_weights(subject)} at step {meta['step']:,}",
        "batch size": train.batch_size,
        "optimizer": f"{OPTIMIZERS[train.optimizer]}, betas {train.b1:g} and {train.b2:g}, "
        f"weight decay {train.weight_decay:g}",
        "learning rate": f"{train.learning_rate:g}, after {train.warmup_steps:,} steps of "
        f"warmup{decay}",
        **({} if "average" in meta else {"EMA decay": f"{train.ema_decay:g}"}),
        "class dropout": f"{train.class_dropout_prob:g}",
        "arithmetic": f"{settings.compute.dtype}, float32 parameters",
        "seed": settings.seed,
    }
    if train.clip_norm:
        rows["gradients"] = f"clipped to a norm of {train.clip_norm:g}"
    if "loss" in meta:
        rows["loss"] = f"{meta['loss']:.4f}"
    if start := meta.get("init_from"):
        rows["started from"] = (
            f"the {start['weights']} of step {start['step']:,} of another checkpoint, sha256 "
            f"`{start['sha256'][:12]}`"
        )
    return _table(rows)


def _name_weights(subject):
    if average := subject.meta.get("average"):  # of dit-ema
        return (
            f"an average of the parameters, of width {average['width']:g} "
            "([Karras et al. 2024](https://arxiv.org/abs/2312.02696)),"
        )
    names = {"ema": "the EMA of the parameters", "params": "the parameters without EMA"}
    return names[subject.weights]


def _show_scores(subject):
    if not subject.receipts:
        return "None: these parameters were not judged by dit-evaluate."
    return "\n\n".join(_show_receipt(*pair) for pair in receipts.names(subject.receipts).items())


def _show_receipt(name, receipt):
    lines = ["| score | value | of real images |", "|---|---|---|"]
    for score in receipt.scores:
        deviation = f" ± {score.deviation:.2g}" if score.deviation is not None else ""
        real = f"{score.real:.4g}" if score.real is not None else ""
        lines.append(f"| {score.name} | {score.value:.4g}{deviation} | {real} |")
    table = "\n".join(lines)
    return f"{receipt.title}. Receipt: `{name}`.\n\n{table}"


def _show_licence(subject):
    weights = subject.licence and f"`{subject.licence}`, as the author states"
    lines = [
        f"- The weights: {weights or 'not stated. Ask the author before you use them'}.",
        "- `dit.py`, the code that runs them: Apache-2.0.",
    ]
    if subject.source:
        lines += [f"- The data: {subject.source.licence}."]
    else:
        lines += ["- The data: whatever their owners allow; nothing is recorded."]
    if not subject.training or "init_from" in subject.meta:
        lines += [
            "- If the weights come from others, their licence holds too. That of the official DiT "
            f"is {OFFICIAL_LICENCE}."
        ]
    return "\n".join(lines)


def _unknown(subject):
    """What a reader may want to know, and the checkpoint does not say."""
    found = ["Biases of the data, and of the images that the model generates."]
    names = {score.name for receipt in subject.receipts for score in receipt.scores}
    if not any(name.startswith("distance to the nearest training") for name in names):
        found += ["Whether the model repeats images that it was trained on."]
    if not names:
        found += ["How good the images are: there are no scores."]
    if not subject.source and not subject.datasets:
        found += ["What the data are, where they come from, and under which licence."]
    if not subject.class_names:
        found += ["What the classes are: the labels have no names."]
    if subject.settings.data.space != "pixels":
        found += ["Which published autoencoder decodes the latents; the wrong one spoils colours."]
    if not subject.licence:
        found += ["The licence of the weights."]
    if not subject.training:
        found += ["How the model was trained."]
    if subject.report and subject.report["passed"] is None:
        found += ["Whether PyTorch computes the same as JAX: it was not checked before the push."]
    return found
