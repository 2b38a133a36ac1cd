"""A language model in a notebook: texts to tokens, splices, and what it writes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lm_families import CASES, TOKENS, save_random
from tiny_runs import D_MODEL, D_SAE, copied

import vsae_jax
from vsae_jax import splices
from vsae_jax.autoencoder.layer_norm import normalise_rows
from vsae_jax.lm import identity
from vsae_jax.system.errors import UserError

PROMPT = "Once there was a little dog"


def bends(x):
    """A splice that does the same to every position."""
    return 0.7 * x + 0.5


@pytest.fixture(scope="module")
def model(tiny_model):
    return vsae_jax.language_model(str(tiny_model), dtype="float32")


@pytest.fixture(scope="module")
def autoencoder(tiny_run):
    return vsae_jax.load(tiny_run)


@pytest.mark.parametrize("text", ["a dog", ["a dog", "a cat"]])
def test_text_in_place_of_tokens_is_refused(model, text):
    for ask in (model.loss, model.logits):
        with pytest.raises(UserError, match="give lm.tokenize"):
            ask(text)


@pytest.fixture(scope="module")
def tokens(model):
    return model.tokenize([PROMPT, "The big red bird was"])[:, :6]


# Not spliced, the whole pass is one that other tests have compiled.
@pytest.mark.parametrize(
    "case, layer",
    [("neox", 1), ("gpt2", None), ("llama one key", None), ("mistral", None)]
    + [
        ("qwen2 windows", None),
        ("qwen3", None),
        ("gemma2", None),
        ("gemma3 scaled", 1),
    ],
)
def test_token_by_token_is_the_whole_pass(case, layer, tmp_path):
    folder = save_random(*CASES[case], tmp_path)
    model = vsae_jax.language_model(folder, backend="jax", dtype="float32")
    splice = identity if layer is None else bends
    (whole,) = model.logits(TOKENS, layer=layer, splices=[splice])
    forward = model.cached(batch=2, length=17, layer=layer, splice=splice)
    for t in range(17):
        logits = forward(TOKENS[:, t : t + 1])
        np.testing.assert_allclose(logits, whole[:, t], atol=1e-4)
    with pytest.raises(ValueError, match="room for 17 positions"):
        forward(TOKENS[:, :1])


def test_a_splice_by_an_autoencoder_knows_its_layer(model, autoencoder, tokens):
    each, layer = [identity, splices.reconstruct(autoencoder)], autoencoder.reader.layer
    (_, said), (_, known) = (
        model.loss(tokens, layer=at, splices=each) for at in (layer, None)
    )
    np.testing.assert_array_equal(said, known)


def assert_likeliest(model, tokens, new, *, layer, splice):
    """Every new token is the likeliest after those before it, by one whole pass."""
    whole = np.concatenate([tokens, new], axis=1)
    (logits,) = model.logits(whole, layer=layer, splices=[splice])
    likeliest = np.argmax(np.asarray(logits), axis=-1)
    start = tokens.shape[1] - 1
    np.testing.assert_array_equal(new, likeliest[:, start:-1])


def test_greedy_is_the_likeliest(model, tokens):
    new = model.generate(tokens, max_new_tokens=5)
    assert new.shape == (2, 5)
    assert_likeliest(model, tokens, new, layer=None, splice=identity)


def test_text_after_text(model):
    text = model.generate(PROMPT, max_new_tokens=6)
    ids = model.generate(model.tokenize(PROMPT), max_new_tokens=6)
    assert ids.shape == (1, 6)
    assert [text] == model.decode(ids) and text


def test_it_ends_at_eos(model, tokens):
    free = model.generate(tokens, max_new_tokens=5)
    end = int(free[0, 2])
    assert end not in free[0, :2] and end not in free[1]
    one, both = (
        dataclasses.replace(model, eos_ids=frozenset(ends)).generate(
            tokens, max_new_tokens=5
        )
        for ends in ({end}, {end, int(free[1, 1])})
    )
    np.testing.assert_array_equal(one[1], free[1])
    assert one[0].tolist() == [*free[0, :2], end, end, end]
    assert both.shape == (2, 3)


def test_generation_config_has_ends_of_its_own(tiny_model, tokens, tmp_path):
    folder = copied(tiny_model, tmp_path / "model")
    model = vsae_jax.language_model(str(folder))
    (first, *_), (second, *_) = model.generate(tokens, max_new_tokens=5).tolist()
    ends = f'{{"eos_token_id": [{first}, {second}]}}'
    (folder / "generation_config.json").write_text(ends)
    assert model.generate(tokens, max_new_tokens=5).tolist() == [[first], [second]]


def test_a_key_draws_by_the_softmax_and_repeats(model):
    prompt = model.tokenize(PROMPT)
    tokens = np.repeat(prompt, 500, axis=0)

    def draw(seed):
        how = {"max_new_tokens": 2, "temperature": 0.5, "key": jax.random.key(seed)}
        return model.generate(tokens, **how)

    drawn = draw(0)
    np.testing.assert_array_equal(drawn, draw(0))
    assert (drawn != draw(1)).any()
    logits = np.asarray(model.logits(prompt)[0], np.float64)[0, -1] / 0.5
    p = np.exp(logits - logits.max())
    p /= p.sum()
    share = np.array([(drawn[:, 0] == i).mean() for i in range(len(p))])
    np.testing.assert_allclose(share, p, atol=4 * 0.5 / 500**0.5)
    assert p.max() < 0.9


@pytest.mark.parametrize("case", ["gpt2", "gemma3"])
def test_both_backends_write_the_same(case, tmp_path):
    folder = save_random(*CASES[case], tmp_path)
    ours, theirs = (
        vsae_jax.language_model(folder, backend=backend, dtype="float32")
        for backend in ("jax", "transformers")
    )
    where = {"layer": 1, "splice": bends}
    for how in ({}, {"temperature": 0.8, "key": jax.random.key(0)}):
        both = [
            model.generate(TOKENS[:, :7], max_new_tokens=6, **how, **where)
            for model in (ours, theirs)
        ]
        np.testing.assert_array_equal(*both)
    assert_likeliest(theirs, TOKENS, theirs.generate(TOKENS, **where), **where)


def test_tokens_and_texts(model):
    texts = [PROMPT, "Tom said  no.", ""]
    tokens = model.tokenize(texts)
    lengths = [len(model.tokenizer.encode(text)) for text in texts]
    assert tokens.shape == (3, 1 + max(lengths)) and tokens.dtype == np.int32
    assert (tokens[:, 0] == model.bos_id).all() and (tokens[2] == model.bos_id).all()
    assert model.decode(tokens) == texts
    np.testing.assert_array_equal(model.tokenize(PROMPT, bos=False), tokens[:1, 1:])
    spelt = model.tokenize("<|endoftext|>", bos=False)
    assert spelt.shape[1] > 1 and model.decode(spelt) == ["<|endoftext|>"]
    clean, padded = model.loss(tokens[1:2])[0], model.loss(tokens)[0][1:2]
    np.testing.assert_allclose(clean, padded, atol=1e-5)


def test_repr_is_a_few_lines(model, tiny_model):
    lines = repr(model).splitlines()
    assert len(lines) <= 3 and max(map(len, lines)) < 200
    assert str(tiny_model) in lines[0] and "GPTNeoXForCausalLM" in lines[0]
    assert "2 blocks, d_model 16, vocabulary 320" in lines[1]


TOO_LONG = np.full((1, 250), 5)


@pytest.mark.parametrize(
    "prompt, how, said",
    [
        (TOO_LONG, {}, "250 tokens and max_new_tokens=32 exceed the 256 positions"),
        (PROMPT, {"layer": 2, "splice": bends}, "layer=2 must be from 0 to 1"),
        (PROMPT, {"temperature": 0.7}, "give a key, such as key=jax.random.key"),
        (PROMPT, {"temperature": -1.0}, "temperature=-1.0 must be"),
        (PROMPT, {"temperature": float("nan")}, "temperature=nan must be"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (np.array([5, 6]), {}, r"shape \[2\].*token ids \[batch, time\]"),
        (np.zeros((1, 0), int), {}, r"shape \[1, 0\]"),
        (np.ones((1, 3)), {}, "float64 is neither text nor token ids"),
        (np.array([[5, 320]]), {}, "ids from 5 to 320, but the vocabulary .* 319"),
        (np.array([[-1]]), {}, "ids from -1"),
    ],
)
def test_what_cannot_be_continued_is_one_line(model, prompt, how, said):
    with pytest.raises(UserError, match=said) as error:
        model.generate(prompt, **how)
    assert "\n" not in str(error.value)


def variants(autoencoder):
    """The same arrays as autoencoders that read the stream in different ways."""
    centred = autoencoder.data | {"center_residual": True}
    return {
        "plain": autoencoder,
        "centred": dataclasses.replace(autoencoder, data=centred),
        "layer norm": dataclasses.replace(autoencoder, layer_norm=True),
    }


@pytest.mark.parametrize("kind", ["plain", "centred", "layer norm"])
def test_ready_splices_are_what_they_say(autoencoder, kind):
    own = variants(autoencoder)[kind]
    residual = 3 * np.random.default_rng(0).normal(size=(2, 5, D_MODEL)) + 1
    residual = residual.astype(np.float32)
    mean = residual.mean(-1, keepdims=True) if kind == "centred" else 0
    x = residual - mean
    f = np.asarray(own.encode(x))
    x_hat = np.asarray(own.decode(f, rows=x))
    np.testing.assert_allclose(
        splices.reconstruct(own)(residual), x_hat + mean, rtol=1e-5, atol=1e-5
    )
    std = np.asarray(normalise_rows(jnp.asarray(x))[2]) if kind == "layer norm" else 1
    scale = float(own.variables["norm"]["scale"])
    directions = np.asarray(own.params["w_dec"]) / scale
    fired = np.flatnonzero(f.any(axis=(0, 1)))[:3]
    assert len(fired) == 3
    expected = residual - (f[..., fired] @ directions[fired]) * std
    for given in (fired, [*fired.tolist(), int(fired[0])]):
        without = splices.ablate(own, given)(residual)
        np.testing.assert_allclose(without, expected, rtol=1e-5, atol=1e-5)
    added = splices.steer(own, int(fired[0]), by=-2.5)(residual) - residual
    np.testing.assert_allclose(np.linalg.norm(added, axis=-1), 2.5, rtol=1e-4)
    unit = directions[fired[0]] / np.linalg.norm(directions[fired[0]])
    np.testing.assert_allclose(added @ unit, -2.5, rtol=1e-4)


def test_ready_splices_under_jit_and_gradients(autoencoder):
    residual = np.random.default_rng(1).normal(size=(2, 5, D_MODEL))
    residual = residual.astype(np.float32)
    for splice in (splices.reconstruct(autoencoder), splices.ablate(autoencoder, 3)):
        compiled = jax.jit(splice)(residual)
        np.testing.assert_allclose(compiled, splice(residual), rtol=1e-5, atol=1e-5)

    def along(by):
        steered = splices.steer(autoencoder, 3, by=by)(residual)
        return jnp.vdot(steered, steered - residual)

    found = jax.grad(along)(2.0)
    slope = (along(2.01) - along(1.99)) / 0.02
    np.testing.assert_allclose(found, slope, rtol=1e-2)


@pytest.mark.parametrize("kind", ["steer", "reconstruct"])
def test_splices_through_the_cache(model, autoencoder, tokens, kind):
    layer = autoencoder.reader.layer
    steer, reconstruct = splices.steer(autoencoder, 5, by=6.0), splices.reconstruct
    splice = steer if kind == "steer" else reconstruct(autoencoder)
    new = model.generate(tokens, max_new_tokens=5, layer=layer, splice=splice)
    assert_likeliest(model, tokens, new, layer=layer, splice=splice)
    clean = model.generate(tokens, max_new_tokens=5)
    assert (new != clean).any()


def test_an_autoencoder_of_another_model_is_refused(autoencoder, tmp_path):
    other = vsae_jax.language_model(save_random(*CASES["llama"], tmp_path))
    for splice in (
        splices.reconstruct(autoencoder),
        splices.ablate(autoencoder, 0),
        splices.steer(autoencoder, 0, by=1.0),
    ):
        with pytest.raises(UserError, match="d_model=16 but the language model 32"):
            other.logits(TOKENS, layer=0, splices=[splice])


def test_an_autoencoder_of_another_site_is_refused(model, autoencoder, tokens):
    hook = {"hook_name": "blocks.0.hook_mlp_out", "layer": 0}
    of_mlp = dataclasses.replace(autoencoder, data=autoencoder.data | hook)
    splice = splices.reconstruct(of_mlp)
    with pytest.raises(
        UserError, match="hook_mlp_out and would be applied at resid_post"
    ):
        model.generate(tokens, layer=0, splice=splice)
    (there,) = model.logits(tokens, layer=0, site="mlp_out", splices=[splice])
    (untouched,) = model.logits(tokens)
    assert np.abs(there - untouched).max() > 1e-3


@pytest.mark.parametrize(
    "latents, said",
    [
        (D_SAE, f"latent {D_SAE} must be from 0 to {D_SAE - 1}"),
        ([3, -1], "latent -1 must be"),
        ([], "must be numbers of latents"),
        (0.5, "0.5.* must be numbers of latents"),
    ],
)
def test_latents_that_are_not_there_are_refused(autoencoder, latents, said):
    with pytest.raises(UserError, match=said):
        splices.ablate(autoencoder, latents)


def test_a_direction_that_is_not_there_is_refused(autoencoder):
    for latent in (-1, D_SAE):
        with pytest.raises(UserError, match=f"latent {latent} must be from 0 to 31"):
            splices.steer(autoencoder, latent, by=1.0)
