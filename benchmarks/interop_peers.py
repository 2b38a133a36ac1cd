"""The half of `interop.py` that runs in the peers' environment, without vsae_jax.

For every `<autoencoder>/<format>/`: loads `ours/` with the format's own library, writes
its latents and x_hat to `theirs.npz`, and lets the library save the same autoencoder
(`saved/`) and some that it made itself (`saved_fresh_<kind>/`), with `result.npz`.
"""

import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

INSIDE = "layers.0"
FRESH = {"d_sae": 512, "k": 16}


def saelens(folder: Path | None, d_in: int, kind: str = ""):
    """An SAE's latents and x_hat as functions, and how it saves itself."""
    from sae_lens import SAE
    from sae_lens.saes import (
        abstopk_sae,
        gated_sae,
        jumprelu_sae,
        standard_sae,
        topk_sae,
    )

    rescaled = {"d_in": d_in, "rescale_acts_by_decoder_norm": True, **FRESH}
    normalised = {"d_in": d_in, "normalize_activations": "layer_norm", **FRESH}
    relu = {"d_in": d_in, "d_sae": FRESH["d_sae"], "apply_b_dec_to_input": False}
    if folder:
        sae = SAE.load_from_disk(folder)
    elif kind == "topk":
        sae = shaken(topk_sae.TopKSAE(topk_sae.TopKSAEConfig(**rescaled)))
    elif kind == "layer_norm":
        sae = shaken(topk_sae.TopKSAE(topk_sae.TopKSAEConfig(**normalised)))
    elif kind == "abstopk":
        config = abstopk_sae.AbsTopKSAEConfig(d_in=d_in, **FRESH)
        sae = shaken(abstopk_sae.AbsTopKSAE(config))
    elif kind == "jumprelu":
        config = jumprelu_sae.JumpReLUSAEConfig(**relu)
        sae = shaken(jumprelu_sae.JumpReLUSAE(config))
    elif kind == "gated":
        sizes = {"d_in": d_in, "d_sae": FRESH["d_sae"]}
        config = gated_sae.GatedSAEConfig(**sizes)
        sae = shaken(gated_sae.GatedSAE(config))
    elif kind.endswith("batchtopk"):
        return in_training(kind, d_in)
    else:
        config = standard_sae.StandardSAEConfig(**relu)
        sae = shaken(standard_sae.StandardSAE(config))
    return sae.encode, lambda f: sae.decode(f), sae.save_model


def in_training(kind: str, d_in: int):
    """A checkpoint of SAELens' training, and the latents of the jumprelu that SAELens
    makes of it for inference."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(kind)
    settings = {"matryoshka_widths": [64, 128, FRESH["d_sae"]]}
    given = settings if kind.startswith("matryoshka") else {}
    made = shaken(sae_class(config_class(d_in=d_in, **FRESH, **given)))
    made.topk_threshold.fill_(0.3)
    with tempfile.TemporaryDirectory() as inference:
        made.save_inference_model(inference)
        sae = SAE.load_from_disk(inference)
    return sae.encode, sae.decode, made.save_model


def dictionary_learning(folder: Path | None, d_in: int, kind: str = ""):
    from dictionary_learning import (
        AutoEncoder,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
    )
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import (
        MatryoshkaBatchTopKSAE,
    )
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    if folder:
        sae, config = load_dictionary(str(folder), device="cpu")
    else:
        trainer = {"activation_dim": d_in, "dict_size": FRESH["d_sae"], "layer": 0}
        sae = AutoEncoder(d_in, FRESH["d_sae"])
        if kind == "topk":
            sae = AutoEncoderTopK(d_in, FRESH["d_sae"], FRESH["k"])
            trainer |= {"k": FRESH["k"]}
        elif kind == "batch_topk":
            sae = BatchTopKSAE(d_in, FRESH["d_sae"], FRESH["k"])
            sae.threshold.fill_(0.3)
            trainer |= {"k": FRESH["k"]}
        elif kind == "matryoshka":
            sizes = [64, 128, FRESH["d_sae"] - 192]
            sae = MatryoshkaBatchTopKSAE(d_in, FRESH["d_sae"], FRESH["k"], sizes)
            sae.threshold.fill_(0.3)
            trainer |= {"k": FRESH["k"], "group_sizes": sizes}
        elif kind == "jump_relu":
            sae = JumpReluAutoEncoder(d_in, FRESH["d_sae"])
        elif kind == "gated":
            sae = GatedAutoEncoder(d_in, FRESH["d_sae"])
        sae = shaken(sae)
        trainer |= {"dict_class": type(sae).__name__}
        config = {"trainer": trainer, "buffer": {}}

    def save(to: Path) -> None:
        to.mkdir(parents=True)
        state = {k: v.cpu() for k, v in sae.state_dict().items()}
        torch.save(state, to / "ae.pt")  # as trainSAE does
        (to / "config.json").write_text(json.dumps(config))

    return sae.encode, sae.decode, save


def sparsify(folder: Path | None, d_in: int, kind: str = ""):
    from sparsify import SparseCoder, SparseCoderConfig

    if folder:
        sae = SparseCoder.load_from_disk(folder)
    else:
        config = SparseCoderConfig(num_latents=FRESH["d_sae"], k=FRESH["k"])
        sae = shaken(SparseCoder(d_in, config))

    def encode(x):
        out = sae.encode(x)
        f = torch.zeros(len(x), sae.num_latents)
        return f.scatter_(1, out.top_indices, out.top_acts)

    def decode(f):
        acts, indices = f.topk(sae.cfg.k, dim=1)
        return sae.decode(acts, indices)

    return encode, decode, sae.save_to_disk


def openai(folder: Path | None, d_in: int, kind: str = ""):
    from sparse_autoencoder.model import Autoencoder, TopK

    if folder:
        path = folder / "autoencoder.pt"
        sae = Autoencoder.from_state_dict(torch.load(path, weights_only=True))
        note = json.loads((folder / "vsae_jax_export.json").read_text())
        sae.normalize = note["input_norm"] == "layer_norm"
    elif kind == "topk":
        made = Autoencoder(FRESH["d_sae"], d_in, TopK(FRESH["k"]), normalize=True)
        sae = shaken(made)
    else:
        sae = shaken(Autoencoder(FRESH["d_sae"], d_in))
    info: dict = {}

    def encode(x):
        f, info["of_rows"] = sae.encode(x)
        return f

    def save(to: Path) -> None:
        to.mkdir(parents=True)
        torch.save(sae.state_dict(), to / "autoencoder.pt")

    return encode, lambda f: sae.decode(f, info["of_rows"]), save


KINDS = {
    "saelens": (
        *("topk", "layer_norm", "abstopk", "relu", "jumprelu", "gated"),
        *("batchtopk", "matryoshka_batchtopk"),
    ),
    "dictionary_learning": (
        *("topk", "relu", "batch_topk", "jump_relu", "gated", "matryoshka"),
    ),
    "sparsify": ("topk",),
    "openai": ("topk", "relu"),
}
LIBRARIES = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "openai": openai,
}


@torch.no_grad()
def shaken(sae):
    """With every weight away from its start, so that nothing is zero or tied."""
    torch.manual_seed(0)
    for parameter in sae.parameters():
        noise = torch.randn_like(parameter)
        parameter += noise * (0.1 if parameter.ndim == 2 else 0.5)
    return sae


@torch.no_grad()
def peers(out: Path, openai_checkout: str) -> None:
    sys.path.insert(0, openai_checkout)
    for rows in sorted(out.glob("*/*/rows.npy")):
        folder, x = rows.parent, torch.from_numpy(np.load(rows))
        if folder.name == "openai" and not openai_checkout:
            continue
        library = LIBRARIES[folder.name]
        encode, decode, save = library(folder / "ours" / INSIDE, x.shape[1])
        f = encode(x)
        np.savez(folder / "theirs.npz", f=f.numpy(), x_hat=decode(f).numpy())
        if "openai" != folder.name:
            # Their file cannot say that rows are not normalised; a note of ours can.
            written(folder / "saved", encode, decode, save, x)
        for kind in KINDS[folder.name]:
            made = library(None, x.shape[1], kind)
            written(folder / f"saved_fresh_{kind}", *made, x)
    names = ("torch", "sae-lens", "dictionary-learning", "eai-sparsify", "numpy")
    here = {found.name for found in metadata.distributions()}
    versions = {name: metadata.version(name) for name in names if name in here}
    (out / "versions.json").write_text(json.dumps(versions))


def written(to: Path, encode, decode, save, x) -> None:
    save(to / INSIDE)
    f = encode(x)
    np.savez(to / "result.npz", f=f.numpy(), x_hat=decode(f).numpy())


@torch.no_grad()
def authors(out: Path) -> None:
    """The authors' VSAETopK, in bfloat16 as they train it, in both modes."""
    from dictionary_learning.trainers.vsae_topk import VSAETopK, VSAETopKConfig

    rows = sorted(out.glob("*/dictionary_learning/rows.npy"))[0]
    x = torch.from_numpy(np.load(rows))
    for april in (True, False):
        config = VSAETopKConfig(
            activation_dim=x.shape[1],
            dict_size=FRESH["d_sae"],
            k=FRESH["k"],
            var_flag=1,
            use_april_update_mode=april,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        sae = shaken(VSAETopK(config))
        folder = out / "authors' VSAETopK" / ("april" if april else "not april")
        (folder / "saved" / INSIDE).mkdir(parents=True)
        np.save(folder / "rows.npy", x.numpy())
        state = {name: tensor.cpu() for name, tensor in sae.state_dict().items()}
        torch.save(state, folder / "saved" / INSIDE / "ae.pt")
        trainer = {"dict_class": "VSAETopK", "k": FRESH["k"], "layer": 0}
        trainer |= {"activation_dim": x.shape[1], "dict_size": FRESH["d_sae"]}
        text = json.dumps({"trainer": trainer})
        (folder / "saved" / INSIDE / "config.json").write_text(text)
        # The same weights in float32: bfloat16 arithmetic would select otherwise.
        sae = sae.float()
        f = sae.encode(x, training=False)[0]
        x_hat = sae.decode(f).numpy()
        np.savez(folder / "saved" / "result.npz", f=f.numpy(), x_hat=x_hat)


if __name__ == "__main__":
    if sys.argv[1] == "peers":
        peers(Path(sys.argv[2]), sys.argv[3])
    else:
        authors(Path(sys.argv[2]))
