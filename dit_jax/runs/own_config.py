"""The config of a run that exists, for a command that names only its workdir.

--config=dit_jax/runs/own_config.py:WORKDIR
"""

import dataclasses

from ml_collections import ConfigDict

from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import workdir as workdirs


def get_config(workdir):
    path = disk.path(workdir)
    if not disk.exists(path / "config.json"):
        raise UserError(f"--config must be given for a new run, and there is none in {workdir}")
    return ConfigDict(dataclasses.asdict(workdirs.read_settings(path))).lock()
