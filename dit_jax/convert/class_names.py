"""The names of labels of a checkpoint that comes from elsewhere, as "class_names" of its meta.

The official files have no names, and 1,000 classes need not be ImageNet's. So names come from what
is known: what the user states (--class_names), or the pipeline of diffusers says.
"""

from pathlib import Path

from absl import logging

from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.sampling import imagenet

IMAGENET = "imagenet"


def read(stated, num_classes):
    """Returns {"class_names": list} of what is stated; {} for None.

    stated: "imagenet", or the path of a text file with the name of label 0, 1, ... on its lines.
    UserError unless there are as many different names as classes.
    """
    if not stated:
        return {}
    names = imagenet.names() if stated == IMAGENET else _read_lines(stated)
    if len(names) != num_classes:
        raise UserError(
            f"class_names must have {num_classes:,} names, one for each class, got {len(names):,} "
            f"in {stated}"
        )
    repeated = _repeated(names)
    if repeated is not None:
        found = f"{repeated!r} twice" if repeated else "an empty line"
        raise UserError(f"class_names must be different names, got {found} in {stated}")
    return {"class_names": list(names)}


def _read_lines(path):
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class_names must be imagenet or a text file, got {path}") from error


def _repeated(names):
    """The first name that is empty or was there before; None if there is none."""
    seen = {""}
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def of_pipeline(folder, num_classes):
    """Returns {"class_names": list} of a pipeline of diffusers; {} if it has only numbers.

    The official pipelines give each label its names in WordNet; they become ImageNet's.
    """
    labels = disk.read_json(Path(folder) / "model_index.json").get("id2label")
    if not isinstance(labels, dict):
        return {}
    texts = [str(labels.get(str(label), label)) for label in range(num_classes)]
    if texts == [str(label) for label in range(num_classes)]:
        return {}
    if imagenet.fit([text.split(",") for text in texts]):
        return {"class_names": list(imagenet.names())}
    if _repeated(texts) is not None:
        logging.warning("%s has labels of the same name: the names are left out", folder)
        return {}
    return {"class_names": texts}


def for_pipeline(class_names, num_classes):
    """The text of each label for a pipeline of diffusers, where commas separate names."""
    if tuple(class_names) == imagenet.names():
        return imagenet.texts()
    return list(class_names) or [str(label) for label in range(num_classes)]
