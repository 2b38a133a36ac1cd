"""`python -m vsae_jax.convert --input=DIR --to=FORMAT --out=DIR`.

Reads a run folder, or the files of SAELens, dictionary_learning, sparsify or OpenAI,
and writes any of these. What a format cannot hold is refused, or noted in
vsae_jax_export.json beside it.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax import interop
from vsae_jax.config import ConvertConfig, cli
from vsae_jax.interop import Autoencoder, Format, card, check, hub, loading, sidecar
from vsae_jax.interop.canonical import with_rule
from vsae_jax.system.errors import UserError
from vsae_jax.system.files import TEMPORARY


def command(configs: Sequence[ConvertConfig]) -> None:
    """Converts what `--input` names."""
    run(configs[0])


def run(c: ConvertConfig) -> Path:
    """Writes `--out`, whole or not at all; returns it."""
    out = Path(c.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists already; name a new folder")
    folder, ae = loading.read(c.input, revision=c.revision or None)
    if c.model_name:
        ae = dataclasses.replace(ae, data=ae.data | {"model": c.model_name})
    target = interop.FORMATS[c.to]
    print(f"{folder}: {_described(ae)} -> {target.NAME}")
    activations = Path(c.activations) if c.activations else _of_run(ae, folder)
    rows, rows_from = check.given_rows(ae, activations, count=c.rows)
    if c.lossy:
        ae = _as_the_format_says(ae, target, rows, rows_from=rows_from)
    temporary = out.with_name(out.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(ae, target, temporary, rows=rows, rows_from=rows_from)
        card.write(temporary, name=out.name, evals=card.evals_of(folder))
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if c.push_to_hub:
        print(f"pushed to {hub.push(out, c.push_to_hub, private=c.private)}")
    return out


def _described(ae: Autoencoder) -> str:
    c = ae.config
    kept = "" if ae.k is None else f", k {ae.k}"
    return f"{ae.source.get('format')} {ae.rule}{kept}, {c.d_model} -> {c.d_sae}"


def _of_run(ae: Autoencoder, folder: Path) -> Path | None:
    """The activations that a run was trained on, if they are still there."""
    own = (ae.train or {}).get("activations")
    if interop.recognised(folder).NAME != "vsae_jax" or not isinstance(own, str):
        return None
    return Path(own) if own and (Path(own) / "manifest.json").is_file() else None


def _as_the_format_says(
    ae: Autoencoder, target: Format, rows: Any, *, rows_from: str
) -> Autoencoder:
    """The autoencoder under the format's own selection rule, with a note on the cost;
    or as it is, if that rule changes nothing."""
    said = with_rule(ae, target.SAYS.get(ae.rule, ae.rule))
    cost = check.cost(ae, said, rows)
    if not cost.rows_changed:
        return ae
    before, after = (
        "none" if value is None else f"{value:.4f}"
        for value in (cost.variance_before, cost.variance_after)
    )
    note = (
        f"lossy: {target.NAME} has {said.rule} for {ae.rule} and drops negative "
        f"latents; x_hat of {100 * cost.rows_changed:.1f} % of {len(rows)} rows "
        f"({rows_from}) changes, explained variance {before} before, {after} after"
    )
    return dataclasses.replace(said, notes=(*ae.notes, note))


def _write(
    ae: Autoencoder, target: Format, folder: Path, *, rows: Any, rows_from: str
) -> None:
    """Writes the files and their note, and checks what was written."""
    says = target.SAYS.get(ae.rule, ae.rule)
    if says != ae.rule:
        check.refuse_negative(ae, rows, format=target.NAME, says=says)
    written = target.rewritten(ae)
    lines = _notes(written, target, says=says, n_rows=len(rows))
    for line in (*ae.notes, *lines):
        print(f"note: {line}")
    weights = target.write(written, folder)
    # Reading OpenAI's format needs the note, which says whether rows are normalised.
    sidecar.write(written, folder, weights=weights, notes=lines, check=None)
    result = check.compare(ae, target.read(folder), rows, rows_from=rows_from)
    sidecar.write(written, folder, weights=weights, notes=lines, check=result._asdict())
    print(check.said(result, k=ae.k))
    if rows_from != check.GENERATED and (result.explained_variance or 0) < 0:
        print(
            "note: the explained variance is below 0: these are not the activations "
            "that it was trained on, or its weights are swapped"
        )


def _notes(ae: Autoencoder, target: Format, *, says: str, n_rows: int) -> list[str]:
    """What the format's own files do not say."""
    lines = []
    if says != ae.rule:
        lines.append(
            f"{target.NAME} says {says} where this is {ae.rule}: the same where no "
            f"kept latent is negative, as on the {n_rows} rows of the self-check"
        )
    if ae.latent_scale != 1:
        lines.append(
            f"latents are {ae.latent_scale:.6g} times those of the scaled input: they "
            "have the units of x"
        )
    if ae.data.get("center_residual") and target.NAME != "vsae_jax":
        lines.append(
            "it was trained on rows from which their mean over d_model was subtracted; "
            "subtract it from yours, too"
        )
    if target.NAME == "openai" and ae.k is not None and not ae.layer_norm:
        lines.append(
            'input_norm is "none" (vsae_jax_export.json): OpenAI\'s own code would '
            "normalise each row of a TopK; set normalize = False there"
        )
    norms = np.linalg.norm(ae.params["w_dec"], axis=1)
    if target.NAME == "dictionary_learning" and ae.rule in ("relu", "none"):
        if not np.allclose(norms, 1, atol=1e-5):
            lines.append(
                "dictionary_learning, loading an AutoEncoder, brings its decoder rows "
                "to norm 1 and scales the latents to match"
            )
    if ae.rule == "batch_topk" and target.NAME == "saelens":
        lines.append(
            "saelens has no batch_topk outside of training; a jumprelu with this one "
            "threshold keeps the same latents"
        )
    if "w_var" in ae.params and target.NAME != "vsae_jax":
        lines.append(
            f"{target.NAME} holds the mean path, {sidecar.EXTRA} the variance head"
        )
    return lines


if __name__ == "__main__":
    cli.main(command, ConvertConfig)
