"""The self-check that ends every import and export: both sides on the same rows."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vsae_jax.activations.shards import Activations
from vsae_jax.autoencoder.reader import Reader
from vsae_jax.interop.canonical import Autoencoder
from vsae_jax.system.errors import UserError

GENERATED = "generated"
_CHUNK = 128
# float32 sums in another order may select another latent where two are nearly equal.
# Where more than this share of the rows differ, it is another autoencoder.
_TOLERANCE, _SHARE = 1e-4, 0.01


class Check(NamedTuple):
    """What the self-check measured; `rows_from` says where its rows are from.

    max_abs_difference: the largest |difference of x_hat| among the rows that agree.
    rows_selected_otherwise: rows that differ by more than 1e-4 of the largest |x_hat|.
    """

    rows: int
    rows_from: str
    l0: float
    l0_max: int
    max_abs_difference: float
    rows_selected_otherwise: int
    explained_variance: float | None
    rows_with_negative_latents: int


class Pass(NamedTuple):
    """Latents and reconstructions of rows."""

    f: Float[np.ndarray, "rows d_sae"]
    x_hat: Float[np.ndarray, "rows d_model"]


def given_rows(ae: Autoencoder, folder: Path | None, *, count: int) -> tuple[Any, str]:
    """Rows of a folder of activations, or generated ones, and what to call them."""
    if folder is None:
        return generated_rows(ae, count=count), GENERATED
    activations = Activations.open(folder)
    found = activations.manifest.d_model
    if found != ae.config.d_model:
        raise UserError(
            f"--activations={folder} has d_model={found}, the autoencoder "
            f"{ae.config.d_model}"
        )
    rows = activations.rows(0, min(count, activations.n_rows))
    return np.asarray(rows, np.float32), folder.name


def generated_rows(ae: Autoencoder, *, count: int) -> Float[np.ndarray, "rows d"]:
    """mean + b_dec / s + random positive sums of the decoder's rows + noise: close to
    what it was trained on, and the same every time."""
    rng = np.random.default_rng(0)
    m, few = ae.config.d_sae, min(ae.k or 16, 64)
    rows = np.empty((count, ae.config.d_model))
    w_dec = ae.params["w_dec"].astype(np.float64)
    size = 1 / max(np.linalg.norm(w_dec, axis=1).mean(), 1e-30) / np.sqrt(few)
    for row in rows:
        row[:] = rng.uniform(0, 2 * size, few) @ w_dec[rng.integers(0, m, few)]
    rows += rng.normal(0, 0.1, rows.shape) * rows.std()
    rows = rows * max(np.linalg.norm(ae.params["b_dec"]), 1) + ae.params["b_dec"]
    return (rows / ae.scale + ae.mean).astype(np.float32)


def run_rows(ae: Autoencoder, rows: Float[np.ndarray, "rows d"]) -> Pass:
    """Latents and x_hat in float32."""
    reader = Reader(
        jax.tree.map(jnp.asarray, ae.variables),
        dataclasses.replace(ae.config, dtype="float32"),
        layer_norm=ae.layer_norm,
    )
    latents, reconstructions = [], []
    for start in range(0, len(rows), _CHUNK):
        x = jnp.asarray(rows[start : start + _CHUNK])
        f = reader.encode(x)
        latents.append(np.asarray(f))
        reconstructions.append(np.asarray(reader.decode(f, rows=x)))
    return Pass(np.concatenate(latents), np.concatenate(reconstructions))


def sane(ae: Autoencoder, rows: Float[np.ndarray, "rows d"]) -> Pass:
    """`run_rows`, refusing an L0 above k and an x_hat that is not finite."""
    out = run_rows(ae, rows)
    l0 = int(np.count_nonzero(out.f, axis=1).max())
    if ae.k is not None and l0 > ae.k:
        raise UserError(f"self-check: L0 is {l0} on a row where k is {ae.k}")
    if not np.isfinite(out.x_hat).all():
        raise UserError("self-check: x_hat is not finite; the weights are too large")
    return out


def compare(
    ours: Autoencoder, theirs: Autoencoder, rows: Any, *, rows_from: str
) -> Check:
    """The self-check of both on the same rows; refuses two different autoencoders."""
    a, b = run_rows(ours, rows), sane(theirs, rows)
    l0 = np.count_nonzero(b.f, axis=1)
    difference = np.abs(a.x_hat - b.x_hat).max(axis=1)
    size = max(float(np.abs(a.x_hat).max()), 1e-30)
    otherwise = difference > _TOLERANCE * size
    if otherwise.mean() > _SHARE:
        raise UserError(
            f"self-check: x_hat differs by up to {difference.max():.2g} (of "
            f"{size:.2g}) on {otherwise.sum()} of {len(rows)} rows; nothing is written"
        )
    agreeing = difference[~otherwise]
    return Check(
        rows=len(rows),
        rows_from=rows_from,
        l0=float(l0.mean()),
        l0_max=int(l0.max()),
        max_abs_difference=float(agreeing.max()) if agreeing.size else 0.0,
        rows_selected_otherwise=int(otherwise.sum()),
        explained_variance=_explained_variance(rows, b.x_hat),
        rows_with_negative_latents=int((a.f < 0).any(axis=1).sum()),
    )


class Cost(NamedTuple):
    """What another selection rule changes on the same rows: the share of rows whose
    x_hat changes by over 1e-4 of the largest, and the explained variance of both."""

    rows_changed: float
    variance_before: float | None
    variance_after: float | None


def cost(ours: Autoencoder, other: Autoencoder, rows: Any) -> Cost:
    """What is lost with `other` in place of `ours`."""
    a, b = run_rows(ours, rows).x_hat, run_rows(other, rows).x_hat
    changed = np.abs(a - b).max(axis=1) > _TOLERANCE * max(np.abs(a).max(), 1e-30)
    before, after = (_explained_variance(rows, x_hat) for x_hat in (a, b))
    return Cost(float(changed.mean()), before, after)


def _explained_variance(x: Any, x_hat: Any) -> float | None:
    x = x.astype(np.float64)
    total = np.square(x - x.mean(axis=0)).sum()
    return float(1 - np.square(x - x_hat).sum() / total) if total else None


def refuse_negative(ae: Autoencoder, rows: Any, *, format: str, says: str) -> None:
    """Refuses a format whose files say another rule, where that would change a row."""
    negative = int((run_rows(ae, rows).f < 0).any(axis=1).sum())
    if negative:
        others = {"abstopk": "--to=saelens or ", "gated_linear": ""}
        lacks = "autoencoder without a relu" if ae.rule == "none" else ae.rule
        raise UserError(
            f"{format} has no {lacks}, and {says} would drop the negative latents "
            f"that {negative} of {len(rows)} rows keep; write it with "
            f"{others.get(ae.rule, '--to=openai or ')}--to=vsae_jax, or drop them with "
            "--lossy=true, which reports the cost"
        )


def said(check: Check, *, k: int | None) -> str:
    """The self-check in one line."""
    variance = check.explained_variance
    parts = [
        f"self-check on {check.rows:,} rows ({check.rows_from}): L0 {check.l0:.1f}"
        + ("" if k is None else f" of k {k}"),
        f"max |difference of x_hat| {check.max_abs_difference:.1e}",
        "no variance" if variance is None else f"explained variance {variance:.4f}",
    ]
    if check.rows_selected_otherwise:
        parts.append(f"{check.rows_selected_otherwise} rows select another latent")
    return ", ".join(parts)
