"""The decoder in JAX, as GPT-NeoX: a pytree with pure methods."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from vsae_jax.config import Hook
from vsae_jax.lm import (
    identity,
    load_language_model,
    load_tokenizer,
)
from vsae_jax.lm.decoder import block_arrays, outer_arrays
from vsae_jax.lm.families import FAMILIES, read_spec
from vsae_jax.lm.tensors import tensor_names
from vsae_jax.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = np.random.default_rng(0).integers(3, 61, size=(2, 17))


def write_neox(folder: Path, *, seed: int = 0, dtype: str = "float32", **changes):
    """A random GPT-NeoX on disk, made without torch; no bias or scale is trivial."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    family = FAMILIES["GPTNeoXForCausalLM"]
    spec = read_spec(family, raw).spec
    outer, block = tensor_names(family, spec)
    shapes = {name: outer_arrays(spec)[ours] for ours, (name,) in outer.items()}
    shapes["embed_out.weight"] = (spec.vocab_size, spec.d_model)
    for i in range(spec.n_layers):
        for ours, (name,) in block.items():
            shape = block_arrays(spec)[ours][::-1]
            shapes[family.layers.format(i) + name] = shape
    rng = np.random.default_rng(seed)
    tensors = {name: 0.3 * rng.normal(size=shapes[name]) for name in shapes}
    tensors = {name: t.astype(jnp.dtype(dtype)) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def neox_stories() -> str:
    """The small trained model, wherever this machine has it."""
    places = [ROOT / "vsae_jax/data/neox-stories"]
    shared = os.environ.get("VSAE_JAX_SHARED", ROOT.parent / "shared")
    places.append(Path(shared) / "models/neox-stories")
    for place in places:
        if (place / "model.safetensors").is_file():
            return str(place)
    return pytest.skip(f"needs the trained model neox-stories in one of {places}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_neox(tmp_path_factory.mktemp("neox"))


@pytest.fixture(scope="module")
def model(folder):
    return load_language_model(folder)


def test_the_trained_model_predicts_its_own_language():
    folder = neox_stories()
    model, tokenizer = load_language_model(folder), load_tokenizer(folder)
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play "
        "outside in the park with her friends. One day, she saw a big dog."
    )
    ids = np.array([[model.bos_id, *tokenizer(text)["input_ids"]]])
    assert model.loss(ids)[0].mean() < 2.5
    shuffled = np.random.default_rng(0).permutation(ids[0])[None]
    assert model.loss(shuffled)[0].mean() > 4.5


def test_residual_computes_nothing_past_its_block(model):
    poison = jax.tree.map(lambda p: p.at[2:].set(jnp.nan), model.params["blocks"])
    params = {name: jnp.nan * model.params[name] for name in ("ln_scale", "unembed")}
    params = {**model.params, **params, "blocks": poison}
    poisoned = dataclasses.replace(model, params=params)
    np.testing.assert_array_equal(
        poisoned.residual(TOKENS, 1), model.residual(TOKENS, 1)
    )
    assert np.isnan(poisoned.residual(TOKENS, 2)).all()
    hooks = [Hook(0), Hook(1, "mlp_out"), Hook(1), Hook(0, "attn_out")]
    for ours, expected in zip(
        poisoned.at(TOKENS, hooks), model.at(TOKENS, hooks), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_splices(model):
    clean = model.logits(TOKENS)[0]
    same, zeroed, same_again = model.logits(
        TOKENS, layer=1, splices=(identity, jnp.zeros_like, lambda x: x + 0)
    )
    np.testing.assert_allclose(same, clean, atol=1e-5)
    np.testing.assert_array_equal(same, same_again)
    assert np.abs(zeroed - clean).max() > 0.1


def test_splice_after_the_last_block_reaches_the_logits(model):
    last = model.n_layers - 1
    seen = []
    model.logits(TOKENS, layer=last, splices=(lambda x: seen.append(x) or x,))
    np.testing.assert_array_equal(seen[0], model.residual(TOKENS, last))
    zeroed = model.logits(TOKENS, layer=last, splices=(jnp.zeros_like,))[0]
    bias = model.params["ln_bias"] @ model.params["unembed"]
    np.testing.assert_allclose(zeroed[0, 0], bias, atol=1e-5)


def test_loss_is_the_cross_entropy_of_the_next_token(model):
    loss, zeroed = model.loss(TOKENS, layer=0, splices=(identity, jnp.zeros_like))
    logits = np.asarray(model.logits(TOKENS)[0], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [[-np.log(p[b, t, TOKENS[b, t + 1]]) for t in range(16)] for b in (0, 1)]
    np.testing.assert_allclose(loss, expected, atol=1e-4)
    assert zeroed.shape == (2, 16) and np.abs(zeroed - loss).max() > 0.1


def test_loss_equals_torch_cross_entropy(model):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    logits = np.array(model.logits(TOKENS)[0])
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:, :-1]).flatten(0, 1),
        torch.tensor(TOKENS[:, 1:]).flatten().long(),
        reduction="none",
    )
    ours = np.asarray(model.loss(TOKENS)[0])
    np.testing.assert_allclose(ours.ravel(), theirs, atol=1e-5)


def test_jit_takes_the_parameters_as_an_argument(model, tmp_path):
    other = load_language_model(write_neox(tmp_path / "other", seed=1))
    other = dataclasses.replace(other, files=model.files, config_hash=model.config_hash)
    traces = []

    @jax.jit
    def run(model, tokens, scale):
        traces.append(1)
        splices = (identity, lambda x: scale * x)
        return model.logits(tokens, layer=1, splices=splices), model.loss(tokens)

    for one in (model, other):
        (clean, scaled), (loss,) = run(one, TOKENS, 0.5)
        splices = (lambda x: 0.5 * x,)
        expected = one.logits(TOKENS, layer=1, splices=splices)[0]
        np.testing.assert_allclose(scaled, expected, atol=1e-5)
        np.testing.assert_allclose(clean, one.logits(TOKENS)[0], atol=1e-5)
        np.testing.assert_allclose(loss, one.loss(TOKENS)[0], atol=1e-5)
    assert len(traces) == 1


def test_gradient_into_a_splice_equals_finite_differences(model):
    direction = jax.random.normal(jax.random.key(0), (2, 17, 48))

    def loss(step):
        splices = (lambda x: x + step * direction,)
        return model.loss(TOKENS, layer=0, splices=splices)[0].mean()

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(loss)(0.0), slope, rtol=0.02)


def test_strict_promotion_of_ranks_and_types(model):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        logits = jax.jit(lambda m: m.loss(TOKENS, layer=1))(model)[0]
    assert np.isfinite(logits).all()


def test_facts(model, folder):
    assert (model.d_model, model.n_layers, model.vocab_size) == (48, 3, 61)
    assert (model.bos_id, model.special_ids) == (1, frozenset({1, 2}))
    assert model.name == folder and model.revision is None


def test_an_id_outside_the_vocabulary_is_not_clamped(model):
    tokens = TOKENS.copy()
    tokens[0, 5] = 61
    residual = model.residual(tokens, 0)
    assert np.isnan(residual[0, 5]).all() and np.isfinite(residual[1]).all()


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_out_of_range_is_named(model, layer):
    with pytest.raises(UserError, match=f"layer={layer} must be from 0 to 2"):
        model.residual(TOKENS, layer)


def test_misused_splices_are_refused(model):
    with pytest.raises(ValueError, match="need a layer"):
        model.logits(TOKENS, splices=(jnp.zeros_like,))
    with pytest.raises(ValueError, match="returned the shape"):
        model.logits(TOKENS, layer=0, splices=(lambda x: x[:1],))
