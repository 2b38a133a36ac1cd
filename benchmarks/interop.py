"""Do the real libraries agree with our files, and we with theirs?

    python -m benchmarks.interop --runs=RUN,RUN --activations=DIR,DIR --out=NEW_DIR \
        --peers=PYTHON [--openai=CHECKOUT] [--authors=CHECKOUT]

PYTHON has torch, sae-lens, eai-sparsify and dictionary-learning, which cannot live
beside a current JAX: files are the interface (`interop_peers.py` runs there). Make it
with pip install torch==2.13.0, then the three, then pip uninstall torchvision, whose
build is another's. Each run is exported to every format, loaded by its library, saved
again by it, and read by us; on 1,000 rows of its activations both sides' latents and
x_hat are compared. Expected: at most 1e-5 of the largest value on rows that select the
same latents, which is all of them but for ties of float32.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import vsae_jax
from vsae_jax import convert, interop, runs
from vsae_jax.activations.shards import Activations
from vsae_jax.config import ConvertConfig
from vsae_jax.system.errors import UserError

PEERS = Path(__file__).with_name("interop_peers.py")
ROWS = 1000
# The convention of a folder's name in sparsify; any other name does elsewhere.
INSIDE = "layers.0"


def main() -> None:
    """Exports, asks the peers, reads what they saved, and prints the table."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("runs", "activations", "out", "peers"):
        flags.add_argument(f"--{name}", required=True)
    for name in ("openai", "authors"):
        flags.add_argument(f"--{name}", default="")
    a = flags.parse_args()
    out = Path(a.out)
    pairs = zip(a.runs.split(","), a.activations.split(","), strict=True)
    for run, activations in pairs:
        export(Path(run), Path(activations), out)
    ask_peers(a.peers, out, openai=a.openai, authors=a.authors)
    print("| autoencoder | format | direction | x_hat | latents | rows otherwise |")
    print("|---|---|---|---|---|---|")
    for folder in sorted(out.glob("*/*/")):
        for row in rows_of_table(folder):
            print("| " + " | ".join(row) + " |")
    print(json.loads((out / "versions.json").read_text()))


def export(run: Path, activations: Path, out: Path) -> None:
    """One folder a format with our files, the rows, and our latents and x_hat."""
    rows = Activations.open(activations)
    x = np.asarray(rows.rows(0, ROWS), np.float32)
    opened = runs.open_run(run).train
    case = f"{opened.preset} {opened.variant}" if opened else run.name
    for to in interop.FORMATS:
        if to == "vsae_jax":
            continue
        folder = out / case / to
        config = ConvertConfig(
            input=str(run),
            to=to,
            out=str(folder / "ours" / INSIDE),
            activations=str(activations),
        )
        try:
            convert.run(config)
        except UserError as error:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "refused").write_text(str(error))
            continue
        np.save(folder / "rows.npy", x)
        f, x_hat = ours(folder / "ours" / INSIDE, x)
        np.savez(folder / "ours.npz", f=f, x_hat=x_hat)


def ours(folder: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and x_hat of rows by `vsae_jax.load`."""
    loaded = vsae_jax.load(folder)
    f = loaded.encode(x)
    return np.asarray(f), np.asarray(loaded.decode(f, rows=x))


def ask_peers(python: str, out: Path, *, openai: str, authors: str) -> None:
    """Runs the other half in the peers' environment."""
    subprocess.run([python, PEERS, "peers", out, openai], check=True)
    if authors:
        # The authors' package has the name of the one that it was forked from.
        env = os.environ | {"PYTHONPATH": authors}
        subprocess.run([python, PEERS, "authors", out], check=True, env=env)


def rows_of_table(folder: Path) -> Iterator[tuple[str, ...]]:
    """What was measured in one folder: ours read by them, theirs read by us."""
    name = folder.parent.name, folder.name
    if (folder / "refused").is_file():
        yield *name, "refused", (folder / "refused").read_text(), "", ""
        return
    theirs = folder / "theirs.npz"
    if (folder / "ours.npz").is_file() and theirs.is_file():
        found = compared(np.load(folder / "ours.npz"), np.load(theirs))
        yield *name, "they read ours", *found
    for saved in sorted(folder.glob("saved*/")):
        f, x_hat = ours(saved / INSIDE, np.load(folder / "rows.npy"))
        result = np.load(saved / "result.npz")
        yield (
            *name,
            f"we read {saved.name}",
            *compared({"f": f, "x_hat": x_hat}, result),
        )


def compared(a, b) -> tuple[str, str, str]:
    """Largest difference of x_hat and latents, as shares of the largest value, on rows
    that select the same latents; and the number of the others."""
    same = ((a["f"] != 0) == (b["f"] != 0)).all(axis=1)
    shares = [
        np.abs(a[n][same] - b[n][same]).max() / np.abs(b[n]).max()
        for n in ("x_hat", "f")
    ]
    return f"{shares[0]:.1e}", f"{shares[1]:.1e}", f"{(~same).sum()} of {len(same)}"


if __name__ == "__main__":
    main()
