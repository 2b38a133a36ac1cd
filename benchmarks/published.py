"""Do SAELens' own loaders of published autoencoders and ours read the same files?

    python -m benchmarks.published --out=NEW_DIR --peers=PYTHON

PYTHON has torch and sae-lens (`interop.py` says how to make it). `published_peers.py`,
which runs there, writes small files as each release has them on the hub, with random
weights, and has `SAE.from_pretrained(release, id)` load them from this folder in place
of the hub. We load the folder that the same name leads to. Expected: x_hat and latents
equal to 1e-5 of the largest value, on all of 1,000 rows that select the same latents.
"""

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.interop import compared, ours
from vsae_jax.interop import releases

PEERS = Path(__file__).with_name("published_peers.py")


def main() -> None:
    """Has the peers write and load, loads the same, and prints the table."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("out", "peers"):
        flags.add_argument(f"--{name}", required=True)
    a = flags.parse_args()
    out = Path(a.out)
    subprocess.run([a.peers, PEERS, out], check=True)
    print("| name | format | x_hat | latents | rows otherwise |")
    print("|---|---|---|---|---|")
    for path in sorted(out.glob("*.npz")):
        theirs = np.load(path)
        found = releases.find(str(theirs["name"]))
        if found is None:
            raise SystemExit(f"{theirs['name']} is in no table")
        f, x_hat = ours(out / found.repository / found.path, theirs["x"])
        row = compared({"f": f, "x_hat": x_hat}, theirs)
        print("| " + " | ".join((found.name, found.format, *row)) + " |")
    print(json.loads((out / "versions.json").read_text()))


if __name__ == "__main__":
    main()
