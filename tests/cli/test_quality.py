"""The quality that the README promises of a DiT trained on digits. Takes minutes: -m slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(name, *args):
    subprocess.run([sys.executable, "-m", f"dit_jax.cli.{name}", *args], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "conditioning, frechet_distance",  # in the order of the paper's fig. 5
    [("adaln_zero", 0.85), ("adaln", 0.95), ("cross_attention", 1.1), ("in_context", 1.25)],
)
def test_every_design_learns_the_digits(tmp_path, conditioning, frechet_distance):
    command(
        "train",
        "--config=configs/digits.py",
        f"--config.model.conditioning={conditioning}",
        f"--workdir={tmp_path / 'run'}",
    )
    command("evaluate", f"--checkpoint={tmp_path / 'run'}")
    judgments = json.loads((tmp_path / "run" / "judgments.json").read_text())["judgments"]
    assert judgments["agreement"] >= 0.99
    assert judgments["frechet_distance"] <= frechet_distance
    # The model must not memorise: samples are about as far from training digits as held-out ones.
    assert judgments["nearest_distance"] > 0.9 * judgments["nearest_distance_held_out"]
