"""A run, resolved: what to train, on what, and where it goes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vsae_jax import runs
from vsae_jax.activations.bad_rows import LeftOut, left_out
from vsae_jax.activations.given import GivenRows
from vsae_jax.activations.shards import Activations
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.penalties import PENALTIES
from vsae_jax.config import (
    PROCESS_FIELDS,
    RUNTIME_FIELDS,
    ExtractConfig,
    Hook,
    SAEConfig,
    TrainConfig,
    default_activations,
    presets,
    resolve_train,
    sae_config,
)
from vsae_jax.config.fields import difference, to_json, with_new_fields
from vsae_jax.system import mesh as meshes
from vsae_jax.system.errors import UserError
from vsae_jax.training import loggers, native
from vsae_jax.training.step import TrainState, init_state

# A few seconds of two cores.
_CPU_OPERATIONS = 10**11


class PlannedRun(NamedTuple):
    """A run, resolved: what to train, on what, where it goes, and on which devices.

    asked: the config before its unset fields were filled. mesh: None for one device.
    left_out: rows that are not trained on. kernels: those of the step, with a note.
    """

    asked: TrainConfig
    train: TrainConfig
    sae: SAEConfig
    data: dict[str, Any]
    activations: Activations
    folder: Path
    mesh: Mesh | None = None
    left_out: LeftOut | None = None
    kernels: native.Choice = native.Choice("xla", "")

    @property
    def batches(self) -> tuple[Any, ...]:
        """What decides the batches: runs that agree in it take the same ones."""
        of_data = (f.name for f in fields(self.train) if f.metadata["group"] == "data")
        names = "steps", "batch_size", *of_data
        return tuple(getattr(self.train, name) for name in names)


def plan(config: TrainConfig, given: GivenRows | None = None) -> PlannedRun:
    """Opens the activations, or takes those that are given; checks them against the
    preset and resolves the config."""
    if given is None:
        layer = presets.EXTRACT_PRESETS[config.preset]["layer"]
        place = config.activations or default_activations(
            ExtractConfig().model, Hook(layer)
        )
        activations = Activations.open(place)
        _check_preset(config.preset, activations)
    else:
        place, activations = "", given
    resolved = resolve_train(config, d_model=activations.d_model)
    loggers.check(resolved)
    folder = Path(config.out or f"runs/{run_name(config)}")
    resolved = replace(resolved, activations=str(place), out=str(folder))
    dtype = resolved.dtype
    if dtype == "auto":
        dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    mesh = meshes.open_mesh(resolved.mesh)
    meshes.check(mesh, d_sae=resolved.d_sae, batch_size=resolved.batch_size)
    bad = left_out(
        activations,
        bad_rows=resolved.bad_rows,
        giant=resolved.giant,
        max_norm_multiple=resolved.max_norm_multiple,
    )
    static = sae_config(resolved, d_model=activations.d_model, dtype=dtype)
    return PlannedRun(
        asked=config,
        train=resolved,
        sae=static,
        data=_data(activations, resolved)
        | ({"left_out": bad.described()} if bad else {})
        | ({"forked_from": config.fork_from} if config.fork_from else {}),
        activations=activations,
        folder=folder,
        mesh=mesh,
        left_out=bad,
        kernels=native.choice(
            resolved.kernels,
            static,
            batch_size=resolved.batch_size,
            together=mesh is not None or resolved.arms == "vmap",
        ),
    )


def run_name(config: TrainConfig) -> str:
    """The variant, then every field that was set: `vsae_topk_k-256_beta-0.1`."""
    unset = TrainConfig()
    parts = [
        f"{name}-{value}"
        for name, value in to_json(config).items()
        if value != getattr(unset, name)
        and name not in RUNTIME_FIELDS
        and name != "variant"
    ]
    return file_name([config.variant, *parts])


def file_name(parts: Iterable[str]) -> str:
    """The parts as one folder's name: shares as 1/4 have a slash."""
    return "_".join(parts).replace("/", "of")


def _check_preset(preset: str, activations: Activations) -> None:
    for name, needed in presets.REQUIRED_OF_ACTIVATIONS[preset].items():
        found = getattr(activations.manifest, name)
        if found != needed:
            raise UserError(
                f"--preset={preset} needs activations with {name}={needed}, but "
                f"{activations.folder} has {name}={found}; extract again with "
                f"--{name}={str(needed).lower()} or choose another --preset"
            )


def _data(activations: Activations, config: TrainConfig) -> dict[str, Any]:
    """What the run is trained on, for config.json; the last contexts are held out."""
    if activations.in_order:  # their number is not known
        rows = config.steps * config.batch_size
        return activations.described() | {"train_rows": rows}
    n_contexts = activations.n_contexts
    held_out = max(math.ceil(n_contexts * config.held_out), 1)
    if held_out >= n_contexts:
        raise UserError(
            f"{activations.folder} has {n_contexts} contexts and --held_out="
            f"{config.held_out} holds out all of them; extract more tokens"
        )
    return {
        **activations.described(),
        "train_rows": (n_contexts - held_out) * activations.rows_per_context,
        "held_out_contexts": [n_contexts - held_out, n_contexts],
    }


def explain(planned: PlannedRun) -> None:
    """Prints what is trained, and which flags have no effect here."""
    c, rows = planned.train, planned.train.steps * planned.train.batch_size
    k = f"k {c.k}, " if planned.sae.has_k else ""
    passes = f"{rows / planned.data['train_rows']:.2f} epochs"
    if c.stream:
        passes = f"of further text, shuffled {c.buffer_rows:,} at a time"
    print(
        f"{c.variant} (preset {c.preset}): d_model {planned.sae.d_model}, "
        f"d_sae {c.d_sae}, {k}{c.steps} steps of {c.batch_size} rows "
        f"({passes}), {planned.sae.dtype}, "
        f"{_devices(planned.mesh)}, to {planned.folder}"
    )
    if planned.kernels.note:
        print(f"note: {planned.kernels.note}")
    if planned.sae.gate == "sigma":
        print("note: no other library's format can hold a gate by sigma")
    elif not planned.sae.relu and planned.sae.sparsity in ("none", "topk"):
        print(
            "note: it keeps negative latents, which the formats of SAELens, "
            "dictionary_learning and sparsify cannot hold; to export it there, train "
            "with --relu=true"
        )
    if planned.left_out:
        print(
            f"note: {len(planned.left_out.rows)} of {planned.activations.n_rows} rows "
            f"{planned.left_out.why} and are left out; the first is row "
            f"{planned.left_out.rows[0]}"
        )
    if planned.asked.beta and c.penalty != "kl":
        print(f"note: --beta={c.beta} changes nothing: penalty is {c.penalty} here")
    if planned.asked.noise_at and not planned.sae.noise:
        print(f"note: --noise_at={c.noise_at} changes nothing: --noise_std is 0 here")
    for penalty in (PENALTIES[name] for name in ("gate_l1", "gate_error", "nested")):
        if getattr(planned.asked, penalty.weight) and not penalty.on(c):
            needs = "--prefixes" if penalty.weight == "nested" else "--gate=path"
            print(f"note: --{penalty.weight} changes nothing without {needs}")
    if planned.sae.auxk and c.dead_after_tokens >= rows:
        print(
            f"note: AuxK cannot act: --dead_after_tokens={c.dead_after_tokens} is not "
            f"reached in a run of {rows} rows"
        )


def _devices(mesh: Mesh | None) -> str:
    kind = jax.devices()[0].device_kind
    return kind if mesh is None else f"{mesh.size} x {kind} ({meshes.name(mesh)})"


def steps_at_once(arms: Sequence[PlannedRun]) -> int:
    """The most steps in one call to the device: what was asked for, but on a CPU so few
    that a signal is noticed within seconds. A step of an arm has six matrix products
    and about a thousand other operations for each latent of a batch."""
    c = arms[0].train
    most = c.log_every, c.checkpoint_every or c.steps, c.steps
    asked = min(c.steps_per_dispatch, *most)
    if jax.default_backend() != "cpu":
        return asked
    operations = sum(
        planned.train.batch_size * planned.sae.d_sae * (12 * planned.sae.d_model + 1000)
        for planned in arms
    )
    return max(min(asked, _CPU_OPERATIONS // operations), 1)


def open_folder(planned: PlannedRun) -> bool:
    """Makes or checks the run folder; False when the run is already finished."""
    train = {n: v for n, v in to_json(planned.train).items() if n not in PROCESS_FIELDS}
    stated = {"train": train, "sae": to_json(planned.sae), "data": planned.data}
    path = planned.folder / runs.CONFIG
    if not path.is_file():
        if runs.holds_other_files(planned.folder):
            raise UserError(f"--out={planned.folder} is not empty and not a run folder")
        planned.folder.mkdir(parents=True, exist_ok=True)
        _write_config(planned, stated)
        return True
    stored = runs.read_json(path)
    younger = {"train": TrainConfig, "sae": SAEConfig}
    for part, kind in younger.items():
        if isinstance(stored.get(part), dict):
            stored[part] = with_new_fields(kind, stored[part])
    changed = "; ".join(
        text
        for part in stated
        if (text := difference(_lasting(stored.get(part)), _lasting(stated[part])))
    )
    if changed and not _anything_saved(planned.folder):
        print(f"{planned.folder}: nothing was saved under another config ({changed})")
        _write_config(planned, stated)
        return True
    if changed:
        raise UserError(
            f"{planned.folder} holds a run with another config ({changed}); give the "
            "same flags to go on with it, or another --out, with --fork_from="
            f"{planned.folder} to start there from what is trained"
        )
    return not (planned.folder / runs.PARAMETERS).is_file()


def _write_config(planned: PlannedRun, stated: dict[str, Any]) -> None:
    # What another config came to says nothing of this one.
    (planned.folder / runs.DIVERGED).unlink(missing_ok=True)
    device = jax.devices()[0].device_kind
    record = stated | {"versions": runs.versions(), "device": device}
    runs.write_json(planned.folder / runs.CONFIG, record)


def _anything_saved(folder: Path) -> bool:
    """Whether there are checkpoints or parameters, which must not be lost."""
    checkpoints = folder / runs.CHECKPOINTS
    saved = checkpoints.is_dir() and any(checkpoints.iterdir())
    return saved or (folder / runs.PARAMETERS).is_file()


def _lasting(part: Any) -> dict[str, Any]:
    part = part if isinstance(part, dict) else {}
    # An older run has no hash of the weights; its manifest's hash covers them.
    fleeting = RUNTIME_FIELDS | {"weights_hash"}
    return {n: v for n, v in part.items() if n not in fleeting}


def first_b_dec(planned: PlannedRun, sample: jax.Array) -> jax.Array | None:
    """The first b_dec, in normalised units, from raw rows; None for 0."""
    if planned.train.b_dec_init != "geometric_median":
        return None
    scale, mean = _input_norm(planned)
    return _median(sample, scale, mean)


@jax.jit
def _median(sample: jax.Array, scale: jax.Array, mean: jax.Array) -> jax.Array:
    return sae.geometric_median(scale * (sample - mean[None, :]))


def first_state(planned: PlannedRun, b_dec: jax.Array | None) -> TrainState:
    """The state before the first step, by the run's seed."""
    scale, mean = _input_norm(planned)
    specs = sae.arrays(planned.sae).values()
    starts = {s.times: getattr(planned.train, s.times) for s in specs if s.times}
    # k decides nothing here, so that one program serves all of a grid's.
    config = replace(planned.sae, k=planned.sae.d_sae)
    key = jax.random.key(planned.train.seed)
    return _first_state(key, scale, mean, b_dec, starts, config=config)


@partial(jax.jit, static_argnames="config")
def _first_state(
    key: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    b_dec: jax.Array | None,
    starts: dict[str, jax.Array],
    *,
    config: SAEConfig,
) -> TrainState:
    weights_key, noise_key = jax.random.split(key)
    variables = sae.init(
        weights_key, config, scale=scale, mean=mean, b_dec=b_dec, **starts
    )
    return init_state(variables, noise_key, config)


def _input_norm(planned: PlannedRun) -> tuple[float, np.ndarray]:
    """The scale and mean that give rows the root mean square norm asked for."""
    rows = planned.left_out or planned.activations.manifest
    mean = np.zeros(planned.sae.d_model, np.float32)
    mean_squared_norm = rows.mean_squared_norm
    if planned.train.center_input:
        mean = np.asarray(rows.mean, np.float32)
        mean_squared_norm -= float(np.sum(np.square(np.asarray(rows.mean))))
    wanted = {"unit": 1.0, "sqrt_d": math.sqrt(planned.sae.d_model)}
    scale = planned.train.input_scale
    if scale == "none":
        return 1.0, mean
    if not mean_squared_norm > 0:
        raise UserError(f"{planned.activations.folder}: every activation row is 0")
    norm = wanted[scale] if isinstance(scale, str) else scale
    return norm / math.sqrt(mean_squared_norm), mean
