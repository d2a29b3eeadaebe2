"""The quality that the README promises of a DiT trained on digits. Takes minutes: -m slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(name, *args):
    subprocess.run([sys.executable, "-m", f"dit_jax.cli.{name}", *args], cwd=ROOT, check=True)


def train_and_judge(workdir, *options, config="digits"):
    """The judgments of a model of digits that is trained with these options."""
    command("train", f"--config=configs/{config}.py", *options, f"--workdir={workdir}")
    command("evaluate", f"--checkpoint={workdir}")
    return json.loads((workdir / "judgments.json").read_text())["judgments"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "conditioning, frechet_distance",  # in the order of the paper's fig. 5
    [("adaln_zero", 0.85), ("adaln", 0.95), ("cross_attention", 1.1), ("in_context", 1.25)],
)
def test_every_design_learns_the_digits(tmp_path, conditioning, frechet_distance):
    judgments = train_and_judge(tmp_path / "run", f"--config.model.conditioning={conditioning}")
    assert judgments["agreement"] >= 0.99
    assert judgments["frechet_distance"] <= frechet_distance
    # The model must not memorise: samples are about as far from training digits as held-out ones.
    assert judgments["nearest_distance"] > 0.9 * judgments["nearest_distance_held_out"]


@pytest.mark.slow
def test_two_more_classes_are_learned_in_a_quarter_of_the_steps(tmp_path):
    """From the digits 0 to 7 to all ten, by the commands of runs/README.md."""
    eight = ("--config.data.classes=0,1,2,3,4,5,6,7", "--config.model.num_classes=8")
    assert train_and_judge(tmp_path / "eight", *eight)["agreement"] >= 0.99
    short = ("--config.run.total_steps=500", "--config.train.decay_steps=500")
    ten = train_and_judge(tmp_path / "ten", f"--init_from={tmp_path / 'eight'}", *short)
    new = ten["agreement_by_label"][8:]  # of 100 samples each
    assert sum(new) / len(new) >= 0.97 and min(new) >= 0.95
    assert ten["agreement"] >= 0.99
    assert ten["nearest_distance"] > 0.9 * ten["nearest_distance_held_out"]


@pytest.mark.slow
def test_one_network_call_draws_digits(tmp_path):
    """After a sixth of the steps of its config."""
    short = ("--config.run.total_steps=500", "--config.train.decay_steps=500")
    judgments = train_and_judge(tmp_path / "run", *short, config="digits_meanflow")
    assert judgments["agreement"] >= 0.85  # of random pictures: 0.1
    assert judgments["frechet_distance"] <= 2.5
