"""Models of several families through transformers: hooks, splices, refusals."""

import importlib.util
import shutil

import numpy as np
import pytest
from test_lm_decoder import TOKENS, write_neox

from vsae_jax.lm import identity, load_language_model
from vsae_jax.system.errors import UserError

HAS_TORCH = importlib.util.find_spec("torch") is not None

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
# Family -> its config class, its settings, and the norm above the last block.
FAMILIES = {
    "GPT2": (GPT2, "transformer.ln_f"),
    "Llama": (SMALL, "model.norm"),
    "Gemma": (SMALL, "model.norm"),
    "Gemma2": (SMALL, "model.norm"),
    "Gemma3Text": (SMALL, "model.norm"),
    "Qwen2": (SMALL, "model.norm"),
    "Qwen3": (SMALL, "model.norm"),
}


def save_random(family: str, settings: dict, folder) -> str:
    """A small random model of a family, as transformers saves it."""
    torch = pytest.importorskip("torch", reason="needs torch")
    import transformers

    config = getattr(transformers, f"{family}Config")(**settings)
    module = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2, generator=generator)
    module.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs torch")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_random("Llama", SMALL, tmp_path_factory.mktemp("llama"))
    return load_language_model(folder, backend="transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_the_hidden_states(torch, family, tmp_path):
    settings, norm = FAMILIES[family]
    folder = save_random(family, settings, tmp_path)
    model = load_language_model(folder, backend="transformers")
    assert (model.d_model, model.n_layers, model.vocab_size) == (32, 3, 61)
    assert (model.bos_id, model.special_ids) == (1, frozenset({0, 1, 2, 3}))
    with torch.no_grad():
        ids = torch.as_tensor(TOKENS)
        theirs = model.module(ids, output_hidden_states=True, use_cache=False)
        states = [state.numpy() for state in theirs.hidden_states]
        for layer in range(2):
            ours = model.residual(TOKENS, layer)
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, states[layer + 1], atol=1e-5)
        last = model.residual(TOKENS, 2)
        assert np.abs(last - states[3]).max() > 0.1
        normed = model.module.get_submodule(norm)(torch.as_tensor(last)).numpy()
    np.testing.assert_allclose(normed, states[3], atol=1e-4)
    np.testing.assert_allclose(model.logits(TOKENS)[0], theirs.logits, atol=1e-5)


def test_residual_stops_at_its_block(llama):
    ran = []
    parts = {
        "block 0": llama.module.model.layers[0],
        "block 1": llama.module.model.layers[1],
        "block 2": llama.module.model.layers[2],
        "head": llama.module.lm_head,
    }
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, part in parts.items()
    ]
    llama.residual(TOKENS, 1)
    stopped = list(ran)
    llama.logits(TOKENS)
    for handle in handles:
        handle.remove()
    assert stopped == ["block 0", "block 1"]
    assert ran[2:] == ["block 0", "block 1", "block 2", "head"]


def test_splices_and_loss(torch, llama):
    clean = llama.logits(TOKENS)[0]
    residual = llama.residual(TOKENS, 1)
    seen = []
    same, zeroed, swapped = llama.logits(
        TOKENS,
        layer=1,
        splices=(lambda x: seen.append(x) or x, np.zeros_like, lambda x: x[::-1]),
    )
    np.testing.assert_array_equal(seen[0], residual)
    np.testing.assert_allclose(same, clean, atol=1e-5)
    assert np.abs(zeroed - clean).max() > 0.1
    # The blocks above see nothing else of the text, so they must swap along.
    np.testing.assert_allclose(swapped, clean[::-1], atol=1e-5)
    np.testing.assert_array_equal(llama.logits(TOKENS)[0], clean)

    losses = llama.loss(TOKENS, layer=1, splices=(identity, np.zeros_like))
    for loss, logits in zip(losses, (clean, zeroed), strict=True):
        expected = torch.nn.functional.cross_entropy(
            torch.as_tensor(logits[:, :-1]).transpose(1, 2),
            torch.as_tensor(TOKENS[:, 1:]),
            reduction="none",
        )
        np.testing.assert_allclose(loss, expected, atol=1e-4)


def test_blocks_below_a_splice_run_once_and_change_no_bit(llama):
    ran = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(llama.module.model.layers)
    ]
    clean = llama.logits(TOKENS)[0]
    whole, ran[:] = list(ran), []
    spliced = llama.logits(TOKENS, layer=1, splices=(identity, np.copy))
    assert (whole, ran) == ([0, 1, 2], [0, 1, 2, 2])
    for handle in handles:
        handle.remove()
    for logits in spliced:
        np.testing.assert_array_equal(logits, clean)
    for layer in range(3):
        residual = llama.residual(TOKENS, layer)
        np.testing.assert_array_equal(llama.logits_from(residual, layer), clean)
    np.testing.assert_array_equal(llama.logits(TOKENS)[0], clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_agree_on_losses(torch, family, tmp_path):
    folder = save_random(family, FAMILIES[family][0], tmp_path)
    theirs = load_language_model(folder, backend="transformers")
    residual = theirs.residual(TOKENS, 0)
    streams = residual, np.zeros_like(residual), residual[::-1]
    losses = theirs.losses_from(streams, 0, TOKENS)
    clean, zeroed = theirs.loss(TOKENS, layer=0, splices=(identity, np.zeros_like))
    np.testing.assert_array_equal(losses.ce[0], clean)
    np.testing.assert_array_equal(losses.ce[1], zeroed)
    if family != "Gemma":
        ours = load_language_model(folder, backend="jax")
        for a, b in zip(ours.losses_from(streams, 0, TOKENS), losses, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_error_inside_a_splice_leaves_no_hook_behind(llama):
    clean = llama.logits(TOKENS)[0]

    def fails(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llama.logits(TOKENS, layer=1, splices=(fails,))
    with pytest.raises(ValueError, match="returned the shape"):
        llama.logits(TOKENS, layer=1, splices=(lambda x: x[:1],))
    np.testing.assert_array_equal(llama.logits(TOKENS)[0], clean)


@pytest.mark.usefixtures("torch")
def test_both_backends_agree_on_a_model(tmp_path):
    folder = write_neox(tmp_path)
    ours = load_language_model(folder, backend="jax")
    theirs = load_language_model(folder, backend="transformers")
    assert type(ours) is not type(theirs)
    facts = "name revision d_model n_layers vocab_size bos_id special_ids config_hash"
    for fact in [*facts.split(), "tokenizer_hash"]:
        assert getattr(ours, fact) == getattr(theirs, fact), fact
    np.testing.assert_allclose(
        ours.residual(TOKENS, 1), theirs.residual(TOKENS, 1), atol=1e-4
    )
    splices = (identity, lambda x: 0 * x)
    for a, b in zip(
        ours.loss(TOKENS, layer=1, splices=splices),
        theirs.loss(TOKENS, layer=1, splices=splices),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.usefixtures("torch")
def test_auto_is_jax_for_the_families_that_it_runs(llama, tmp_path):
    assert type(load_language_model(write_neox(tmp_path / "a"))).__name__ == "Decoder"
    assert type(load_language_model(llama.name)).__name__ == "Decoder"
    other = save_random("Gemma", SMALL, tmp_path / "b")
    assert type(load_language_model(other)).__name__ == "HFModel"
    with pytest.raises(UserError, match="does not run.*GemmaForCausalLM.*transformers"):
        load_language_model(other, backend="jax")


def test_pickled_weights_need_transformers(torch, tmp_path):
    whole = load_language_model(write_neox(tmp_path / "a"), backend="transformers")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").unlink()
    torch.save(whole.module.state_dict(), tmp_path / "b" / "pytorch_model.bin")
    with pytest.raises(UserError, match="no model.safetensors.*backend=transformers"):
        load_language_model(str(tmp_path / "b"), backend="jax")
    pickled = load_language_model(str(tmp_path / "b"))
    np.testing.assert_array_equal(
        pickled.residual(TOKENS, 2), whole.residual(TOKENS, 2)
    )


@pytest.mark.usefixtures("torch")
def test_weights_that_transformers_would_invent_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = write_neox(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lack {name}"):
        load_language_model(folder, backend="transformers")


def test_a_family_with_its_blocks_elsewhere_is_refused(tmp_path):
    settings = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 61}
    folder = save_random("Mpt", {**settings, "eos_token_id": 0}, tmp_path)
    with pytest.raises(UserError, match="MptForCausalLM keeps its blocks in none of"):
        load_language_model(folder)


@pytest.mark.usefixtures("torch")
def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    ran = tmp_path / "ran"
    write_neox(
        tmp_path / "model",
        model_type="of_its_own",
        auto_map={
            "AutoConfig": "code.Config",
            "AutoModelForCausalLM": "code.Model",
        },
    )
    (tmp_path / "model" / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        load_language_model(str(tmp_path / "model"))
    assert not ran.exists()


def test_loading_draws_no_bar_and_leaves_them_as_they_were(torch, tmp_path, capfd):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    folder = save_random("Llama", SMALL, tmp_path)
    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    capfd.readouterr()
    load_language_model(folder, backend="transformers")
    assert "Loading" not in capfd.readouterr().err
    assert before == (logging.is_progress_bar_enabled(), are_progress_bars_disabled())


@pytest.mark.skipif(HAS_TORCH, reason="torch is installed")
def test_without_torch_one_line_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"pip install torch .*'\.\[torch\]'"):
        load_language_model(write_neox(tmp_path), backend="transformers")
