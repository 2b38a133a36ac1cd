"""The half of `published.py` that runs in the peers' environment, without vsae_jax."""

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import EntryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import (
    get_config_overrides,
    get_repo_id_and_folder_name,
)
from sae_lens.saes import sae as saes
from safetensors.numpy import save_file

D, M, K, ROWS = 64, 512, 16, 1000
GEMMA_2 = "gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"
GEMMA_3 = "gemma-scope-2-4b-pt-res", "layer_17_width_16k_l0_big"
STANDARD = "gpt2-small-res-jb", "blocks.8.hook_resid_pre"
TOPK = "gpt2-small-resid-post-v5-32k", "blocks.8.hook_resid_post"
BENCH = "sae_bench_pythia70m_sweep_topk_ctx128_0730"


def arrays(**names: str) -> dict[str, np.ndarray]:
    """Random weights of SAELens' orientation, by the names of a file."""
    rng = np.random.default_rng(0)
    made = {
        "W_enc": rng.normal(size=(D, M)) * 0.2,
        "b_enc": rng.normal(size=M) * 0.2,
        "W_dec": rng.normal(size=(M, D)) * 0.2,
        "b_dec": rng.normal(size=D) * 0.2,
        "threshold": rng.uniform(0.1, 2, M),
    }
    return {names.get(n, n): np.float32(a) for n, a in made.items()}


def gemma_2(folder: Path) -> None:
    np.savez(folder / "params.npz", **arrays())


def gemma_3(folder: Path) -> None:
    named = arrays(W_enc="w_enc", W_dec="w_dec")
    save_file(named, folder / "params.safetensors")
    # It asks the hub for the header of the file.
    shapes = {name: list(array.shape) for name, array in named.items()}
    loaders.get_safetensors_tensor_shapes = lambda *_: shapes


def before_6(folder: Path, **config) -> None:
    """As SAELens 3 and 4 wrote, and most releases are."""
    known = {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre"}
    known |= {"d_in": D, "d_sae": M, "dtype": "torch.float32", "prepend_bos": True}
    (folder / "cfg.json").write_text(json.dumps(known | {"context_size": 128} | config))
    named = arrays() | {"scaling_factor": np.ones(M, np.float32)}
    del named["threshold"]
    save_file(named, folder / "sae_weights.safetensors")


def topk_before_6(folder: Path) -> None:
    kwargs = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    before_6(folder, normalize_activations="layer_norm", **kwargs)


def dictionary_learning(folder: Path) -> None:
    a = {n: torch.from_numpy(array) for n, array in arrays().items()}
    state = {"encoder.weight": a["W_enc"].T, "encoder.bias": a["b_enc"]}
    state |= {"decoder.weight": a["W_dec"].T, "b_dec": a["b_dec"]}
    torch.save(state | {"k": torch.tensor(K)}, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": M}
    trainer |= {"k": K, "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped"}
    config = {"trainer": trainer, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))


CASES = {
    GEMMA_2: gemma_2,
    GEMMA_3: gemma_3,
    STANDARD: before_6,
    TOPK: topk_before_6,
    (BENCH, "blocks.3.hook_resid_post__trainer_0"): dictionary_learning,
}


@torch.no_grad()
def main(out: Path) -> None:
    """Writes each case where its release has it; `*.npz`: what SAELens makes of it."""

    def download(repo_id, filename, subfolder="", **_):
        path = out / repo_id / subfolder / filename
        if not path.is_file():
            raise EntryNotFoundError(f"no {path}")
        return str(path)

    loaders.hf_hub_download = download
    small = {"d_in": D, "d_sae": M}
    saes.get_config_overrides = lambda *name: get_config_overrides(*name) | small
    x = np.random.default_rng(1).normal(size=(ROWS, D)).astype(np.float32)
    for number, (name, write) in enumerate(CASES.items()):
        folder = out.joinpath(*get_repo_id_and_folder_name(*name))
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        sae = SAE.from_pretrained(*name)
        f = sae.encode(torch.from_numpy(x))
        found = {"x": x, "f": f.numpy(), "x_hat": sae.decode(f).numpy()}
        np.savez(out / f"{number}.npz", name="/".join(name), **found)
    versions = {name: metadata.version(name) for name in ("sae-lens", "torch")}
    (out / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
