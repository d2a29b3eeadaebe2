"""The config of a run that exists, for a command that names only its workdir.

--config=dit_jax/runs/own_config.py:WORKDIR
"""

import dataclasses

from ml_collections import ConfigDict

from dit_jax import settings as settings_lib
from dit_jax.errors import UserError
from dit_jax.machine import disk


def get_config(workdir):
    path = disk.path(workdir)
    if not disk.exists(path / "config.json"):
        raise UserError(f"--config must be given for a new run, and there is none in {workdir}")
    return ConfigDict(dataclasses.asdict(read_settings(path))).lock()


def read_settings(workdir):
    """The Settings in config.json; UserError if it is corrupt."""
    path = workdir / "config.json"
    try:
        fields = disk.read_json(path)
        if "run" not in fields:
            raise UserError("it has no topic run")
        return settings_lib.read(fields)
    except UserError as error:
        raise UserError(
            f"{path} must be the config of a run, but it is damaged: restore it or use another "
            f"workdir ({error})"
        ) from error
