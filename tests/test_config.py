"""Configs: what wins, what each preset says, and the way to JSON and back."""

import dataclasses
import itertools
import json
import math

import pytest

from vsae_jax.config import (
    PROCESS_FIELDS,
    EvalConfig,
    ExtractConfig,
    SAEConfig,
    TrainConfig,
    fields,
    resolve_extract,
    resolve_train,
    sae_config,
)
from vsae_jax.config.presets import TRAIN_PRESETS, VARIANTS, default_help
from vsae_jax.system.errors import UserError

D_MODEL = 512


def resolved(**fields) -> TrainConfig:
    return resolve_train(TrainConfig(**fields), d_model=D_MODEL)


def chosen(config, names) -> dict:
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    "preset, variant", list(itertools.product(TRAIN_PRESETS, VARIANTS))
)
def test_every_preset_and_variant_resolves_to_a_whole_config(preset, variant):
    config = resolved(preset=preset, variant=variant)
    unset = {n for n, v in fields.to_json(config).items() if v is None}
    assert unset == PROCESS_FIELDS - {"coordinator"} | {"max_norm_multiple"}
    static = sae_config(config, d_model=D_MODEL, dtype="float32")
    assert static.sparsity == VARIANTS[variant]["sparsity"]
    assert (static.d_model, static.d_sae) == (D_MODEL, config.d_sae)
    # Filling what is filled changes nothing.
    assert resolve_train(config, d_model=D_MODEL) == config


def test_an_explicit_value_wins_over_preset_and_variant():
    assert resolved(preset="released").beta == 1.0
    assert resolved(preset="released", beta=0.25).beta == 0.25
    # The variant says relu, the preset's row for it agrees, the flag does not.
    assert resolved(preset="released", variant="vsae_topk").relu is True
    assert resolved(preset="released", variant="vsae_topk", relu=False).relu is False


def test_a_presets_own_row_for_a_variant_wins_over_the_variant():
    # vsae_topk is sampled (Baker and Li 2.2); the released code never sampled.
    assert resolved(variant="vsae_topk").noise_std == 1.0
    assert resolved(preset="released", variant="vsae_topk").noise_std == 0.0


@pytest.mark.parametrize(
    "name, value",
    [
        ("beta", 0.0),
        ("noise_std", 0.0),
        ("l1", 0.0),
        ("auxk", 0.0),
        ("dead_after_tokens", 0),
        ("lr_warmup_steps", 0),
        ("lr_decay_start", 0),
        ("kl_warmup_steps", 0),
        ("relu", False),
        ("subtract_b_dec", False),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_is_a_value_and_not_unset(name, value, variant):
    config = resolved(variant=variant, **{name: value})
    assert getattr(config, name) == value


def test_a_default_is_said_by_preset_and_by_the_variants_that_differ():
    said = default_help("beta", table="train")
    assert said == "0.1 (vaease 1.0); released 1.0"
    assert default_help("nested", table="train") == "1.0"


def test_zero_switches_off_what_costs():
    config = resolved(variant="vsae_topk", noise_std=0.0, auxk=0.0)
    static = sae_config(config, d_model=D_MODEL, dtype="float32")
    assert not static.noise and not static.auxk
    static = sae_config(resolved(variant="topk"), d_model=D_MODEL, dtype="float32")
    assert static.auxk and not static.noise


def test_the_paper_is_the_default():
    config = resolved()
    assert (config.preset, config.variant, config.seed) == ("paper", "vsae_topk", 0)
    expected = {
        "d_sae": 2048,
        "relu": False,
        "noise_std": 1.0,
        "variance": "fixed",
        "penalty": "kl",
        "kl_over": "all",
        "selection": "value",
        "decoder_norm": "unit",
        "subtract_b_dec": True,
        "clip_norm": 1.0,
        "auxk": 0.0,
    }
    assert chosen(config, expected) == expected
    assert (config.adam_b1, config.adam_b2) == (0.9, 0.999)


def test_released_vsae_topk_is_the_code_that_made_the_numbers():
    """docs/paper_and_code.md 3 and 7."""
    expected = {
        "relu": True,
        "noise_std": 0.0,
        "selection": "magnitude",
        "lr": 8e-4,
        "beta": 1.0,
        "d_sae": 8192,
        "steps": 10_001,
        "batch_size": 192,
        "decoder_norm": "free",
        "decoder_init_norm": 0.1,
        "subtract_b_dec": False,
        "b_dec_init": "zeros",
        "auxk": 0.0,
        "input_scale": "unit",
        "penalty": "kl",
    }
    assert chosen(resolved(preset="released"), expected) == expected


def test_released_topk_has_what_the_released_vsae_lacks():
    config = resolved(preset="released", variant="topk")
    expected = {
        "auxk": 1 / 32,
        "dead_after_tokens": 10_000_000,
        "decoder_norm": "unit",
        "decoder_init_norm": 1.0,
        "subtract_b_dec": True,
        "b_dec_init": "geometric_median",
        "penalty": "none",
        "lr": 2e-4 / math.sqrt(8192 / 2**14),
    }
    assert chosen(config, expected) == expected


def test_baseline_is_topk_at_unit_scale_with_dictionary_learnings_auxk():
    config = resolved(preset="baseline", variant="topk")
    expected = {"auxk": 1 / 32, "auxk_units": "variance", "input_scale": "unit"}
    assert chosen(config, expected) == expected


@pytest.mark.parametrize("d_sae, lr", [(2**14, 2e-4), (2**12, 4e-4), (2**16, 1e-4)])
def test_lr_auto(d_sae, lr):
    assert resolved(d_sae=d_sae, lr="auto").lr == pytest.approx(lr)


def test_defaults_that_are_shares_of_the_run():
    config = resolved(variant="topk", steps=500, batch_size=100)
    assert config.lr_warmup_steps == 10
    assert config.kl_warmup_steps == 50
    assert config.lr_decay_start == 400
    assert config.dead_after_tokens == 2500
    assert config.k_aux == D_MODEL // 2
    assert resolved(d_sae=100).k_aux == 100
    # It is an int32, and so is the counter of silent rows.
    assert resolved(steps=2**30, batch_size=2**16).dead_after_tokens == 2**30


@pytest.mark.parametrize(
    ("steps", "warmup"), [(150, 200), (1500, 200), (10_000, 200), (30_000, 600)]
)
@pytest.mark.parametrize("variant", ["topk", "vsae_topk"])
def test_released_warms_up_over_200_steps_or_more(variant, steps, warmup):
    config = resolved(preset="released", variant=variant, steps=steps)
    assert config.lr_warmup_steps == warmup
    chosen = resolved(preset="released", steps=steps, lr_warmup_steps=30)
    assert chosen.lr_warmup_steps == 30
    assert resolved(preset="paper", steps=1500).lr_warmup_steps == 30


def test_extract_takes_layer_and_center_from_the_preset():
    paper, released = (
        resolve_extract(ExtractConfig(preset=p)) for p in ("paper", "released")
    )
    assert (paper.layer, paper.bos, paper.center_residual) == (0, "drop", False)
    assert (released.layer, released.center_residual) == (3, True)
    zero = resolve_extract(ExtractConfig(preset="released", layer=0))
    assert (zero.layer, zero.out.split("/")[-1]) == (0, "blocks.0.hook_resid_post")


def bad(config_class, said: str, **fields) -> None:
    with pytest.raises(UserError) as error:
        config_class(**fields)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"k": 0}, "--k=0 must be at least 1"),
        ({"k": 9, "d_sae": 8}, "--k=9 must not exceed --d_sae=8"),
        ({"beta": -0.5}, "--beta=-0.5 must be at least 0"),
        ({"beta": math.nan}, "--beta=nan must be a finite number"),
        ({"noise_std": math.inf}, "--noise_std=inf must be a finite number"),
        ({"lr": 0.0}, "--lr=0.0 must be above 0"),
        ({"input_scale": -1.0}, "--input_scale=-1.0 must be above 0"),
        ({"clip_norm": 0.0}, "--clip_norm=0.0 must be above 0"),
        ({"adam_b1": 1.0}, "--adam_b1=1.0 must be below 1"),
        ({"held_out": 0.0}, "--held_out=0.0 must lie between 0 and 1"),
        ({"held_out": 1.0}, "--held_out=1.0 must be below 1"),
        ({"steps": 0}, "--steps=0 must be at least 1"),
        ({"log_every": 0}, "--log_every=0 must be at least 1"),
        ({"checkpoint_every": -1}, "--checkpoint_every=-1 must be at least 0"),
        ({"lr_warmup_steps": -1}, "--lr_warmup_steps=-1 must be at least 0"),
        ({"beta": 1e300}, "--beta=1e+300 must be a finite number (of float32)"),
        ({"steps": 2**31}, "--steps=2147483648 must be below 2147483648"),
        ({"dead_after_tokens": 10**10}, "--dead_after_tokens=10000000000 must be"),
        ({"seed": 2**32}, "--seed=4294967296 must be below 2^32"),
        ({"data_seed": -1}, "--data_seed=-1 must be at least 0"),
    ],
)
def test_train_refuses(fields, said):
    bad(TrainConfig, said, **fields)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_tokens": 0}, "--num_tokens=0 must be at least 1"),
        ({"layer": -1}, "--layer=-1 must be at least 0"),
        ({"context_length": 2, "skip_positions": 2}, "--context_length=2 leaves no"),
        ({"context_length": 1, "bos": "drop"}, "--context_length=1 leaves no row"),
    ],
)
def test_extract_refuses(fields, said):
    bad(ExtractConfig, said, **fields)


def test_evaluate_refuses():
    bad(EvalConfig, "--run is not set")
    bad(EvalConfig, "--batch_size=0 must be at least 1", run="r", batch_size=0)


def test_k_above_a_default_d_sae_is_refused_too():
    assert TrainConfig(k=4096).d_sae is None
    with pytest.raises(UserError, match="--k=4096 must not exceed --d_sae=2048"):
        resolved(k=4096)


def test_k_is_no_matter_to_a_variant_without_top_k():
    assert TrainConfig(variant="relu", k=9, d_sae=8).k == 9


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().k = 3  # type: ignore


@pytest.mark.parametrize(
    "config",
    [
        resolved(),
        resolved(beta=0.0, relu=False, input_scale=3.5),
        resolved(preset="released", variant="topk"),
        resolve_extract(ExtractConfig(preset="released")),
        SAEConfig(d_model=4, d_sae=8, k=2),
        EvalConfig(run="runs/a"),
    ],
)
def test_json_and_back_is_the_same_config(config):
    text = json.dumps(fields.to_json(config), allow_nan=False)
    assert fields.from_json(type(config), json.loads(text), where="x") == config


def test_from_json_names_unknown_and_missing_keys():
    values = fields.to_json(SAEConfig(d_model=4, d_sae=8, k=2))
    del values["d_sae"]
    with pytest.raises(UserError, match="run/config.json: SAEConfig .* at d_sae, kk"):
        fields.from_json(SAEConfig, values | {"kk": 1}, where="run/config.json")


@pytest.mark.parametrize(
    "name, value",
    [
        ("d_sae", "8"),
        ("k", None),
        ("k", 2.0),
        ("relu", 1),
        ("relu", "true"),
        ("sparsity", "top"),
        ("dtype", ["float32"]),
    ],
)
def test_from_json_names_values_of_another_type(name, value):
    values = fields.to_json(SAEConfig(d_model=4, d_sae=8, k=2)) | {name: value}
    with pytest.raises(UserError, match=f"does not match this version at {name}$"):
        fields.from_json(SAEConfig, values, where="x")


def test_from_json_takes_objects_only_and_whole_numbers_for_any():
    with pytest.raises(UserError, match="x: SAEConfig is no JSON object"):
        fields.from_json(SAEConfig, [], where="x")
    values = fields.to_json(resolved()) | {"beta": 1, "input_scale": "unit"}
    assert fields.from_json(TrainConfig, values, where="x").beta == 1


def test_difference_names_what_changed():
    old, new = {"a": 1, "b": 2, "gone": 0}, {"a": 1, "b": 3, "new": None}
    assert fields.difference(old, new) == "b: 2 -> 3, gone: 0 -> None"
    assert fields.difference(old, dict(old)) == ""
