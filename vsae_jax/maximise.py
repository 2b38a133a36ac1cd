"""`python -m vsae_jax.maximise --run=RUN --latents=3,17`: text made to fire a latent.

A sequence of soft tokens (softmax over the vocabulary, times the embedding) climbs
the gradient of the latent's pre-activation at its last position, through the model.
The temperature falls, each soft token is rounded to its likeliest token, and the
sequence is run again as tokens. Reported is how strongly that fires the latent, beside
the best real sequence in the held-out text.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vsae_jax import lm, runs
from vsae_jax.autoencoder.reader import Reader
from vsae_jax.config import MaximiseConfig, cli
from vsae_jax.config.fields import to_json
from vsae_jax.interop.loading import open_any
from vsae_jax.latents.ascent import Schedule, climb
from vsae_jax.lm import Traceable
from vsae_jax.lm.token_text import token_texts
from vsae_jax.runs.opening import Subject, subject_of
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError

FOLDER = "maximised"


def command(configs: Sequence[MaximiseConfig]) -> None:
    """Maximises the latents that `--latents` names."""
    run(configs[0])


def run(c: MaximiseConfig) -> list[Path]:
    """Writes `maximised/<latent>.json` for every latent; returns the files."""
    opened = open_any(Path(c.run))
    latents = _latents(c.latents, d_sae=opened.sae.d_sae)
    subject = subject_of(opened, c, _load)
    tokenizer = lm.load_tokenizer(subject.lm.files)
    allowed = _allowed(subject.lm, n_named=len(tokenizer))
    real = best_real(subject, latents, length=c.length)
    folder = Path(c.run) / FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    for latent, found in zip(latents, real, strict=True):
        start = time.monotonic()
        result = {
            "latent": latent,
            "synthetic": best_synthetic(subject, latent, allowed=allowed, c=c),
            "real": found,
            "config": subject.config | {"maximise": to_json(c)},
        }
        for kind in ("synthetic", "real"):
            ids = result[kind]["token_ids"]
            texts = token_texts(tokenizer, ids)
            result[kind]["tokens"] = [texts[i] for i in ids]
        paths.append(folder / f"{latent}.json")
        runs.write_json(paths[-1], result)
        print(_line(result, seconds=time.monotonic() - start))
    print(f"wrote {len(paths)} files to {folder}")
    return paths


def best_synthetic(
    subject: Subject,
    latent: int,
    *,
    allowed: Bool[np.ndarray, " vocab"],
    c: MaximiseConfig,
) -> dict[str, Any]:
    """The restart that fires the latent most, after rounding to tokens."""
    climbed = climb(
        subject.lm,  # pyright: ignore[reportArgumentType]  `_load` made it a Traceable
        subject.reader,
        jnp.int32(latent),
        jax.random.split(jax.random.key(c.seed), c.restarts),
        jnp.asarray(allowed),
        Schedule(lr=c.lr, hot=c.hot, cold=c.cold),
        bos_id=subject.lm.bos_id if subject.reader.has_bos else None,
        length=c.length,
        steps=c.steps,
    )
    rounded = subject._replace(tokens=np.asarray(climbed.tokens), batch_size=c.restarts)
    ((tokens, f, mu),) = latents_of(rounded, [latent])
    best, position = peak(f[..., 0], mu[..., 0])
    return {
        "token_ids": tokens[best].tolist(),
        "activations": f[best, :, 0].tolist(),
        "peak": position,
        "pre_activation": float(mu[best, position, 0]),
        "soft_pre_activation": float(climbed.soft[best]),
        "restarts": f[..., 0].max(1).tolist(),
    }


def best_real(
    subject: Subject, latents: Sequence[int], *, length: int
) -> list[dict[str, Any]]:
    """For each latent the `length` tokens up to its highest activation in the text.
    What follows does not matter to a causal model; what precedes them did."""
    best: list[dict[str, Any]] = [{} for _ in latents]
    with progress.bar(len(subject.tokens), unit="contexts") as bar:
        for batch, (tokens, f, mu) in enumerate(latents_of(subject, latents)):
            for j, old in enumerate(best):
                row, position = peak(f[..., j], mu[..., j])
                rank = float(f[row, position, j]), float(mu[row, position, j])
                if not old or rank > (max(old["activations"]), old["pre_activation"]):
                    window = slice(max(position - length + 1, 0), position + 1)
                    best[j] = {
                        "token_ids": tokens[row, window].tolist(),
                        "activations": f[row, window, j].tolist(),
                        "peak": position - window.start,
                        "pre_activation": rank[1],
                        "context": batch * subject.batch_size + row,
                        "position": position,
                    }
            bar.update(len(tokens))
    return best


def peak(
    f: Float[np.ndarray, "contexts time"], mu: Float[np.ndarray, "contexts time"]
) -> tuple[int, int]:
    """The place where the latent is highest, by activation, or by pre-activation if it
    never fires (f = 0)."""
    best = np.lexsort((mu.ravel(), f.ravel()))[-1]
    context, position = np.unravel_index(best, f.shape)
    return int(context), int(position)


def latents_of(
    subject: Subject, latents: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens `[contexts, time]`, activations and pre-activations `[contexts, time,
    latents]`, batch by batch; 0 and -inf at special tokens and positions without a row.
    """
    for tokens, keep, count in subject.batches():
        f, mu = _measure(subject.lm, subject.reader, tokens, jnp.asarray(latents))
        f = np.where(keep[..., None], f, 0.0)
        mu = np.where(keep[..., None], mu, -np.inf)
        yield tokens[:count], f[:count], mu[:count]


@jax.jit
def _measure(
    lm: Traceable,
    reader: Reader,
    tokens: Int[Array | np.ndarray, "batch time"],
    latents: Int[Array, " latents"],
) -> tuple[Float[Array, "batch time latents"], Float[Array, "batch time latents"]]:
    rows = reader.rows(lm.at(tokens, [reader.place])[0])
    f, mu = reader.encode(rows), reader.pre_activations(rows)
    shape = *tokens.shape, len(latents)
    return f[:, latents].reshape(shape), mu[:, latents].reshape(shape)


def _latents(text: str, *, d_sae: int) -> list[int]:
    try:
        latents = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--latents={text} is not a comma list of numbers") from None
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise UserError(f"--latents={latent} must be from 0 to {d_sae - 1}")
    return list(dict.fromkeys(latents))


def _load(
    model: str, *, revision: str | None, backend: str, dtype: lm.Dtype, device: str
) -> lm.LanguageModel:
    """The model in JAX, since only that has gradients; by default in float32, where
    they are exact."""
    del backend
    return lm.load_language_model(
        model,
        revision=revision,
        backend="jax",
        dtype="float32" if dtype == "auto" else dtype,
        device=device,
    )


def _allowed(model: lm.LanguageModel, *, n_named: int) -> Bool[np.ndarray, " vocab"]:
    """The mask of tokens that text can hold: neither special ones nor padding of the
    vocabulary."""
    allowed = np.arange(model.vocab_size) < n_named
    allowed[sorted(model.special_ids)] = False
    return allowed


def _line(result: dict[str, Any], *, seconds: float) -> str:
    synthetic, real = result["synthetic"], result["real"]
    fired = max(synthetic["activations"]), max(real["activations"])
    text = "".join(synthetic["tokens"])
    return (
        f"latent {result['latent']}: synthetic {fired[0]:.4g}, best real "
        f"{fired[1]:.4g} ({seconds:.1f} s): {text!r}"
    )


if __name__ == "__main__":
    cli.main(command, MaximiseConfig)
