"""A trained autoencoder from Python: array kinds, raw units, prompts, repr, saving."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoders import make, write
from tiny_runs import D_MODEL, D_SAE, call, copied

import vsae_jax
from vsae_jax import runs
from vsae_jax.lm import load_language_model, load_tokenizer
from vsae_jax.system.errors import UserError

TEXTS = ["Tom saw a big dog.", "Tom"]


@pytest.fixture(scope="module")
def trained(tiny_run) -> vsae_jax.TrainedSAE:
    return vsae_jax.load(tiny_run)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 3, D_MODEL)).astype("f4")


def test_numpy_in_numpy_out(trained, x):
    f = trained.encode(x)
    assert type(f) is np.ndarray and f.shape == (2, 3, D_SAE) and f.dtype == np.float32
    f[..., 3] = 0  # one ablates latents: it has to be writable
    assert type(trained.decode(f)) is type(trained(x)) is np.ndarray
    assert np.count_nonzero(trained.encode(x), axis=-1).max() == trained.k


def test_jax_in_jax_out(trained, x):
    f = trained.encode(jnp.asarray(x))
    assert isinstance(f, jax.Array) and isinstance(trained.decode(f), jax.Array)
    np.testing.assert_array_equal(f, trained.encode(x))
    np.testing.assert_array_equal(trained(jnp.asarray(x)), trained(x))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_torch_in_torch_out(trained, x, dtype):
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(x, requires_grad=True).to(getattr(torch, dtype))
    f = trained.encode(tensor)
    assert isinstance(f, torch.Tensor) and f.dtype == torch.float32
    expected = trained.encode(tensor.detach().float().numpy())
    np.testing.assert_array_equal(f.numpy(), expected)
    f[..., 3] = 0
    assert isinstance(trained.decode(f), torch.Tensor)
    assert trained(tensor[0].T.contiguous().T).shape == (3, D_MODEL)


def test_a_torch_tensor_that_is_no_row_is_refused_as_others_are(trained):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="expected d_model=16"):
        trained.encode(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="of int32, expected floats"):
        trained.encode(torch.zeros(3, D_MODEL, dtype=torch.int32))


def test_sizes_and_the_decoder_in_raw_units(trained):
    assert (trained.d_model, trained.d_sae, trained.k) == (D_MODEL, D_SAE, 4)
    f = np.zeros(D_SAE, np.float32)
    without = trained.decode(f)
    f[3] = 2
    added = trained.decode(f) - without
    np.testing.assert_allclose(added, 2 * trained.w_dec[3], rtol=1e-4, atol=1e-6)


def test_without_top_k_there_is_no_k(tmp_path):
    loaded = vsae_jax.load(write(make(rule="relu"), "saelens", tmp_path / "o"))
    assert loaded.k is None and ", k" not in repr(loaded)


def test_its_repr_says_what_it_is(tiny_run, trained):
    metrics = runs.read_metrics(tiny_run / runs.METRICS)
    assert repr(trained).splitlines() == [
        f"TrainedSAE topk: d_model {D_MODEL}, d_sae {D_SAE}, k 4",
        f"  of {trained.data['model']}, blocks.0.hook_resid_post",
        "  trained on 640 rows in 20 steps, seed 0",
        f"  explained variance {metrics[-1]['explained_variance']:.4f} in training",
        f"  in {tiny_run}",
    ]


def test_an_evaluation_says_its_explained_variance(tiny_run, tmp_path):
    folder = copied(tiny_run, tmp_path / "run")
    (folder / "evals").mkdir(exist_ok=True)
    core = folder / "evals" / "core.json"
    core.write_text('{"metrics": {"explained_variance": 0.75}}')
    assert vsae_jax.load(folder).explained_variance == 0.75
    core.write_text("{")
    assert vsae_jax.load(folder).explained_variance is None


def test_pickles_are_refused_with_the_way_out(trained):
    with pytest.raises(TypeError, match=r"sae.save\(folder\)") as error:
        pickle.dumps(trained)
    assert "\n" not in str(error.value)
    assert copy.deepcopy([trained])[0] is copy.copy(trained) is trained


def test_what_is_saved_is_loaded_as_it_was(tiny_run, trained, x, tmp_path):
    there = vsae_jax.load(trained.save(tmp_path / "saved"))
    np.testing.assert_array_equal(there.encode(x), trained.encode(x))
    assert (there.sae, there.data, there.train) == (
        trained.sae,
        trained.data,
        trained.train,
    )
    with pytest.raises(UserError, match="exists already; name a new folder"):
        trained.save(tmp_path / "saved")
    assert call("evaluate", run=tmp_path / "saved", num_tokens=200) == 0


def test_an_import_is_saved_with_all_that_is_said_of_it(tmp_path):
    ae = make(layer_norm=True)
    loaded = vsae_jax.load(write(ae, "openai", tmp_path / "o"))
    there = vsae_jax.load(loaded.save(tmp_path / "saved"))
    rows = np.random.default_rng(0).normal(size=(5, 6)).astype("f4")
    np.testing.assert_array_equal(there(rows), loaded(rows))
    assert there.layer_norm and there.train is None
    assert (there.data, there.notes) == (loaded.data, loaded.notes)


def test_a_mistake_is_a_value_error():
    with pytest.raises(ValueError, match="is not a folder"):
        vsae_jax.load("./no/such/folder")


def test_top_latents_of_prompts(trained, tiny_model):
    lm, tokenizer = (
        load_language_model(str(tiny_model)),
        load_tokenizer(str(tiny_model)),
    )
    long, short = trained.top_latents(TEXTS, lm, n=3)
    assert "".join(long.tokens) == TEXTS[0] and "".join(short.tokens) == "Tom"
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    residual = np.asarray(lm.residual(np.array([[lm.bos_id, *ids]]), 0))
    f = trained.encode(residual[0, 1:])
    for row, latents, values in zip(f, long.latents, long.values, strict=True):
        assert latents[0] == np.abs(row).argmax()
        np.testing.assert_allclose(values, row[latents], rtol=1e-4, atol=1e-5)
        assert (np.diff(np.abs(values)) <= 0).all()
    alone = trained.top_latents(TEXTS[1], lm, n=3)
    np.testing.assert_array_equal(alone.latents, short.latents)
    first = str(long).splitlines()[0]
    assert repr(long.tokens[0]) in first and f"{long.latents[0, 0]} (" in first


def test_texts_without_a_token_are_refused(trained, tiny_model):
    lm = load_language_model(str(tiny_model))
    with pytest.raises(UserError, match="there is no token in the texts"):
        trained.top_latents([], lm)


def test_a_prompt_that_is_too_long_is_refused(trained, tiny_model):
    lm = load_language_model(str(tiny_model))
    with pytest.raises(UserError, match=f"takes {lm.max_positions}: cut it"):
        trained.top_latents("dog " * 1000, lm)
