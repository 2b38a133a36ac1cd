"""The half of `released.py` that runs under the peer's interpreter, without vsae_jax.

Drives the authors' `VSAETopKTrainer` by its public methods, as their `trainSAE` does
with `normalize_activations`: rows divided by their root mean square norm, biases
multiplied by it at the end, so that what is saved reads raw rows.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import trainer_module


def main(task: dict[str, Any]) -> None:
    """Trains on every batch of `rows`, in order, and writes `ae.pt` and `config.json`
    into `out`. Ends with a line where a setting is not what `expected` says."""
    library = trainer_module(task["authors"], "vsae_topk")
    rows = np.load(task["rows"], mmap_mode="c")
    torch.manual_seed(task["seed"])
    model = library.VSAETopKConfig(
        rows.shape[-1],
        task["d_sae"],
        task["k"],
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    trainer = library.VSAETopKTrainer(
        model_config=model,
        training_config=library.VSAETopKTrainingConfig(**task["training"]),
        layer=task["layer"],
        lm_name="none",
        seed=task["seed"],
    )
    for name, ours in task["expected"].items():
        if trainer.config[name] != ours:
            sys.exit(f"their {name} is {trainer.config[name]}, ours {ours}")
    if task["start"]:
        take_weights(trainer.ae, np.load(task["start"]))
    for step, x in enumerate(rows):
        trainer.update(step, torch.from_numpy(x) / task["norm"])
    trainer.ae.scale_biases(task["norm"])
    out = Path(task["out"])
    out.mkdir()
    torch.save(trainer.ae.state_dict(), out / "ae.pt")
    (out / "config.json").write_text(json.dumps({"trainer": trainer.config}))


@torch.no_grad()
def take_weights(ae: Any, start: Any) -> None:
    """Gives `ae` the weights w_enc [d_model, d_sae], b_enc, w_dec [d_sae, d_model] and
    b_dec."""
    ae.encoder.weight.copy_(torch.from_numpy(start["w_enc"].T))
    ae.encoder.bias.copy_(torch.from_numpy(start["b_enc"]))
    ae.decoder.weight.copy_(torch.from_numpy(start["w_dec"].T))
    ae.decoder.bias.copy_(torch.from_numpy(start["b_dec"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
