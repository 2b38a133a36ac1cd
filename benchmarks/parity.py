"""Do the peers' trainers compute our loss and our gradients?

    python -m benchmarks.parity --peers=PYTHON --out=NEW_DIR

PYTHON has torch, sae-lens 6 and dictionary-learning (benchmarks/interop.py says how to
make it); `parity_peers.py` runs there, and files are the interface. Each case has one
set of weights and one batch. Expected: the loss and the gradient of every array equal
to 1e-5 of its largest entry; where a library differs, the row says in what, and
compares with that written in our terms.
"""

import argparse
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vsae_jax import losses
from vsae_jax.autoencoder import encoder
from vsae_jax.config import SAEConfig

PEERS = Path(__file__).with_name("parity_peers.py")
D, M, B, K = 64, 256, 128, 8
WIDTHS = (16, 64)
NUMBERS = {
    "k": K,
    "l1": 0.3,
    "gate_l1": 0.3,
    "gate_error": 1.0,
    "nested": 1.0,
    "auxk": 1 / 32,
    "l0": 0.5,
    "target_l0": 0.0,
    "bandwidth": 0.2,
}
TARGET = 20.0
AUXK = {"auxk": True, "k_aux": D // 2}
CASES: dict[str, dict[str, Any]] = {
    "relu": {"sparsity": "none", "penalty": "l1"},
    "topk": AUXK,
    "batch_topk": {"sparsity": "batch_topk"} | AUXK,
    "matryoshka": {"sparsity": "batch_topk", "prefixes": ":".join(map(str, WIDTHS))}
    | AUXK,
    "jump_relu": {"sparsity": "jump_relu", "l0": True, "relu": False}
    | {"subtract_b_dec": False},
    "gated": {"sparsity": "none", "gate": "path"},
}
Loss = Callable[[Mapping[str, Any]], Any]


class Row(NamedTuple):
    """What is compared: a case, a library, in what way, and our loss of that way."""

    case: str
    library: str
    way: str
    loss: Loss
    only_across: bool = False


def main() -> None:
    """Writes the cases, asks the peers, and prints the table."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--peers", required=True)
    flags.add_argument("--out", required=True)
    a = flags.parse_args()
    out = Path(a.out)
    out.mkdir(parents=True)
    for case in CASES:
        np.savez(out / f"{case}.npz", **made(case))
    subprocess.run([a.peers, PEERS, out], check=True)
    print("| case | library | compared with ours | loss | largest gradient | of |")
    print("|---|---|---|---|---|---|")
    for row in rows():
        theirs = np.load(out / f"{row.case}-{row.library}.npz")
        found = compared(row, made(row.case), theirs)
        print("| " + " | ".join((row.case, row.library, row.way, *found)) + " |")
    print((out / "versions.txt").read_text())


def made(case: str) -> dict[str, np.ndarray]:
    """Weights with unit decoder rows, a batch `x`, and which latents are `dead`: a
    half whose values are small, so that none is selected."""
    rng = np.random.default_rng(list(CASES).index(case))
    w_dec = rng.normal(size=(M, D))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    dead = np.arange(M) % 2 == 1
    arrays = {
        "w_dec": w_dec,
        "w_enc": w_dec.T + rng.normal(size=(D, M)) / 20,
        "b_enc": rng.normal(size=M) / 20,
        "b_dec": rng.normal(size=D) / 20,
    }
    if CASES[case].get("auxk"):
        arrays["w_enc"] *= np.where(dead, 0.1, 1)
    if case == "jump_relu":
        arrays["theta"] = rng.uniform(0.3, 1.0, size=M)
    if case == "gated":
        arrays |= {"r_mag": rng.normal(size=M) / 5, "b_mag": rng.normal(size=M) / 5}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return arrays | {"x": rng.normal(size=(B, D)).astype(np.float32), "dead": dead}


def ours(case: str, **changed: Any) -> Loss:
    """Our loss of a case, of its parameters, with some numbers or switches changed."""
    arrays = made(case)
    fixed = {"relu": True, "noise": False, "penalty": "none", "d_model": D, "d_sae": M}
    switches = {n: v for n, v in changed.items() if n not in NUMBERS}
    config = SAEConfig(**{"k": K} | fixed | CASES[case] | switches)
    numbers = NUMBERS | {n: v for n, v in changed.items() if n in NUMBERS}

    def loss(params: Mapping[str, Any]) -> Any:
        x, dead = jnp.asarray(arrays["x"]), jnp.asarray(arrays["dead"])
        return losses.total_loss(params, x, None, numbers, dead, config=config)[0]

    return loss


def rows() -> list[Row]:
    """The comparisons, in the order of the table."""
    n = len(WIDTHS) + 1
    by_variance = {"auxk_units": "variance"}
    across = "its decoder rows' norms weigh L1: w_dec across its rows"
    listed = [
        Row("relu", "saelens", across, ours("relu"), only_across=True),
        Row("relu", "dictionary_learning", "as it is", ours("relu")),
    ]
    for case in ("topk", "batch_topk"):
        listed += [
            Row(case, "saelens", "as it is", ours(case)),
            Row(
                case,
                "dictionary_learning",
                "auxk_units=variance",
                ours(case, **by_variance),
            ),
        ]
    weighed = ours("matryoshka", auxk=NUMBERS["auxk"] * n**2, **by_variance)
    return [
        *listed,
        Row("matryoshka", "saelens", "as it is", ours("matryoshka")),
        Row(
            "matryoshka",
            "dictionary_learning",
            f"its errors are divided by {n} twice; auxk_units=variance",
            lambda p: weighed(p) / n**2,
        ),
        Row("jump_relu", "saelens", "target_l0=0", ours("jump_relu")),
        Row(
            "jump_relu",
            "dictionary_learning",
            "its L0 counts f, not z: half of the rectangle",
            _counting_f,
        ),
        Row(
            "jump_relu",
            "dictionary_learning-on_z",
            "counting z",
            ours("jump_relu", target_l0=TARGET),
        ),
        Row(
            "gated",
            "saelens",
            "its decoder is not frozen, norms weigh L1: the same, w_dec across",
            _not_frozen,
            only_across=True,
        ),
        Row("gated", "dictionary_learning", "as it is", ours("gated")),
    ]


def _counting_f(params: Mapping[str, Any]) -> Any:
    """Our jump_relu without the part of its L0's gradient from z below theta, where f
    is 0 and dictionary_learning's step has no gradient."""
    x, theta = jnp.asarray(made("jump_relu")["x"]), params["theta"]
    width = NUMBERS["bandwidth"]
    z = jax.lax.stop_gradient(x @ params["w_enc"] + params["b_enc"])
    below = (z <= theta) & (jnp.abs(z - theta) < width / 2)
    held = jax.lax.stop_gradient(theta)
    l0 = jax.lax.stop_gradient(jnp.mean(jnp.sum(z > theta, axis=1)))
    outer = 2 * (l0 / TARGET - 1) / TARGET
    missing = jnp.mean(jnp.sum(below / width * (held - theta), axis=1))
    whole = ours("jump_relu", target_l0=TARGET)(params)
    return whole - NUMBERS["l0"] * outer * missing


def _not_frozen(params: Mapping[str, Any]) -> Any:
    """Our gated loss with a decoder that the gate's error trains, too."""
    config = SAEConfig(D, M, sparsity="none", gate="path", relu=True)
    x = jnp.asarray(made("gated")["x"])
    g = encoder.encoded(params, x, config=config).g
    x_hat = jnp.maximum(g, 0) @ params["w_dec"] + params["b_dec"]
    error = jnp.mean(jnp.sum(jnp.square(x - x_hat), axis=1))
    return ours("gated", gate_error=0.0)(params) + error


def compared(
    row: Row, arrays: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> tuple[str, str, str]:
    """The relative difference of the loss; the largest of a gradient, as a share of
    that array's largest entry; and which array has it."""
    params = {n: jnp.asarray(a) for n, a in arrays.items() if n not in ("x", "dead")}
    with jax.default_matmul_precision("highest"):
        loss, gradients = jax.value_and_grad(row.loss)(params)
    found = {}
    for name, ours_ in gradients.items():
        pair = [np.asarray(ours_), theirs[name]]
        if row.only_across and name == "w_dec":
            pair = [_across(g, arrays["w_dec"]) for g in pair]
        found[name] = float(np.abs(pair[0] - pair[1]).max() / np.abs(pair[1]).max())
    worst = max(found, key=lambda name: found[name])
    difference = abs(float(loss) / float(theirs["loss"]) - 1)
    return f"{difference:.1e}", f"{found[worst]:.1e}", worst


def _across(gradient: np.ndarray, w_dec: np.ndarray) -> np.ndarray:
    """The part of each row across that of the decoder: all that is used of it where
    rows are kept at norm 1."""
    return gradient - (gradient * w_dec).sum(axis=1, keepdims=True) * w_dec


if __name__ == "__main__":
    main()
