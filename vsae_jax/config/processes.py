"""The flags of several processes of one run, for every command that takes them."""

import re
from typing import Any

from vsae_jax.system.errors import UserError

# The help of each flag, by its name.
PROCESS_FLAGS = {
    "coordinator": "several processes: HOST:PORT of the first one, the same for all; "
    "auto: from the cluster's environment (SLURM, Open MPI, ...)",
    "num_processes": "processes of the run, with --coordinator=HOST:PORT",
    "process_id": "which of them this is, from 0",
}
# Which process this is: not written into the run's record.
PROCESS_FIELDS = frozenset(PROCESS_FLAGS)


def check_processes(config: Any) -> None:
    """Refuses process flags that are incomplete or contradict one another."""
    c = config
    numbers = {"num_processes": c.num_processes, "process_id": c.process_id}
    given = [f"--{name}={n}" for name, n in numbers.items() if n is not None]
    if c.coordinator in ("", "auto"):
        if given:
            raise UserError(f"{given[0]} needs --coordinator=HOST:PORT")
        return
    if not re.fullmatch(r"\S+:\d{1,5}", c.coordinator):
        raise UserError(f"--coordinator={c.coordinator} is not HOST:PORT, nor auto")
    for name, number in numbers.items():
        if number is None:
            raise UserError(f"--coordinator={c.coordinator} needs --{name} too")
    if not 0 <= c.process_id < c.num_processes:
        raise UserError(
            f"--process_id={c.process_id} must lie between 0 and --num_processes="
            f"{c.num_processes} minus 1"
        )
