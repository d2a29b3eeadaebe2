"""The receipts of dit-evaluate that judge the parameters of a checkpoint, for its model card.

A receipt is receipt.json of any model, or judgments.json of a model of digits. It belongs to
parameters by their digest; an older judgments.json has none, and belongs to a step and its weights.
"""

from pathlib import Path
from typing import NamedTuple

from absl import logging

from dit_jax.errors import UserError
from dit_jax.machine import disk, words

FIELDS = {"samples", "network", "reference", "scores"}  # of a receipt.json
FOLDER = "scores"  # of the receipts in a repository, and beside a checkpoint that was pulled
PLACES = ("evaluation/receipt.json", "judgments.json", f"{FOLDER}/*.json", f"{FOLDER}/*/*.json")
JUDGMENTS = {  # field of judgments.json: (name, field of the same score of real digits)
    "agreement": ("agreement with the label", "classifier_accuracy"),
    "frechet_distance": ("Frechet distance (pixels)", "frechet_floor"),
    "nearest_distance": ("distance to the nearest training digit", "nearest_distance_held_out"),
}


class Score(NamedTuple):
    """A score. deviation, real: None if unknown; real: the same score of real images."""

    name: str
    value: float
    deviation: float | None = None
    real: float | None = None


class Receipt(NamedTuple):
    """A receipt: its file, and the JSON in it."""

    path: Path
    content: dict

    @property
    def scores(self):
        """The scores, a list of Score."""
        if "judgments" in self.content:
            found = self.content["judgments"]
            return [
                Score(name, found[key], real=found.get(real))
                for key, (name, real) in JUDGMENTS.items()
                if key in found
            ]
        held_out = self.content.get("held_out", {})
        return [
            Score(name, score["value"], score.get("deviation"), held_out.get(name))
            for name, score in self.content["scores"].items()
        ]

    @property
    def judged(self):
        """What was judged: {"step", "weights", "digest"}; fields that it lacks are None."""
        about = self.content if "judgments" in self.content else self.content["samples"]
        return {name: about.get(name) for name in ("step", "weights", "digest")}

    @property
    def title(self):
        """How the samples were drawn and what they were compared with, one sentence."""
        content = self.content
        if "judgments" in content:
            guided, unguided = (content["samples"][name] for name in ("guided", "unguided"))
            count = f"{guided:,} samples with guidance and {unguided:,} without"
            about, compared = content, "the training digits and held-out digits"
        else:
            about, compared = content["samples"], _show_reference(content["reference"])
            count = words.count(about["count"], "sample")
            compared += f", by {_show_network(content['network'])}"
        date = f" on {content['time'][:10]}" if "time" in content else ""
        return (
            f"dit-evaluate{date}: {count}, {show_sampling(about['sampling'])}, seed "
            f"{about['seed']}; compared with {compared}"
        )


def show_sampling(options):
    """Returns options of sampling as text, with the names that dit-sample has for them."""
    shown = [f"`{name}={options[name]}`" for name in ("sampler", "num_steps", "cfg_scale")]
    shown += [f"`{name}`" for name in ("clip_x0",) if options.get(name)]
    return ", ".join(shown)


def _show_reference(reference):
    if "training_images" in reference:
        return f"{words.count(reference['training_images'], 'training image')}"
    return f"the reference with sha256 `{reference['sha256'][:12]}`"


def _show_network(network):
    if network["network"] == "classifier":
        accuracy = network.get("held_out_accuracy")
        right = f", right about {accuracy:.1%} of held-out images" if accuracy else ""
        return f"a classifier of the training data{right}"
    known = "" if network.get("published", True) else " with other weights than the published ones"
    return network["network"] + known


def read(path):
    """Returns the Receipt in a file, or in a folder of dit-evaluate; UserError if it is none."""
    file = disk.path(path)
    if file.is_dir():
        names = ("receipt.json", "judgments.json")
        file = next((file / name for name in names if (file / name).is_file()), file / names[0])
    content = disk.read_json(file)
    receipt = Receipt(file, content)
    try:
        if not (isinstance(content.get("judgments"), dict) or content.keys() >= FIELDS):
            raise KeyError("scores")
        for part in ("judged", "scores", "title"):  # all that a card needs
            getattr(receipt, part)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"scores must be a file that dit-evaluate wrote, got {path} without {error}"
        ) from error
    return receipt


def choose(given, home, *, step, weights, digest):
    """Returns the Receipts of parameters: those given, or else those in the folder of the run.

    given: paths, each of which must judge these parameters, or it is a UserError. home: the folder
    of the run or of the converted checkpoint.
    """
    known = {"step": step, "weights": weights, "digest": digest}
    if given:
        found = [read(path) for path in given]
        for receipt in found:
            if not _is_of(receipt, known):
                raise UserError(
                    f"scores must be of the {weights} of step {step} of the checkpoint, "
                    f"got {receipt.path} of {_show(receipt)}"
                )
        return found
    paths = sorted({path for place in PLACES for path in Path(home).glob(place)})
    kept = []
    for path in paths:
        try:
            receipt = read(path)
        except (UserError, OSError) as error:
            logging.warning("%s is left out: %s", path, error)
            continue
        if _is_of(receipt, known):
            kept.append(receipt)
        else:
            logging.info("%s is left out: it is of %s", path, _show(receipt))
    return kept


def _is_of(receipt, known):
    judged = receipt.judged
    names = ("digest",) if judged["digest"] else ("step", "weights")
    return all(judged[name] == known[name] for name in names)


def _show(receipt):
    judged = receipt.judged
    if judged["step"] is None:
        return "images that exist"
    other = " of other parameters" if judged["digest"] else ""
    return f"the {judged['weights']} of step {judged['step']}{other}"


def names(receipts):
    """Returns {file name in a repository: Receipt}, each name once."""
    found = {}
    for receipt in receipts:
        stem = base = receipt.path.stem
        number = 1
        while f"{FOLDER}/{stem}.json" in found:
            number += 1
            stem = f"{base}-{number}"
        found[f"{FOLDER}/{stem}.json"] = receipt
    return found
