"""Configs of SAELens before 6, which most published autoencoders have, as those of 6.

SAELens 6 does the same when it loads one (`handle_pre_6_0_config`) but ignores what it
does not know; here, what would change a latent is refused.
"""

from pathlib import Path
from typing import Any

from vsae_jax.interop.canonical import shown
from vsae_jax.system.errors import UserError

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_KEPT = "d_in d_sae dtype device normalize_activations reshape_activations"
_OF_MODEL = (
    "model_name hook_name hook_head_index context_size prepend_bos dataset_path "
    "model_from_pretrained_kwargs"
)
# Settings that would change what is computed.
_REFUSED = "finetuning_scaling_factor is_transcoder d_out hook_point_out hook_name_out"
_DEFAULTS = {"architecture": "standard", "activation_fn": "relu", "prepend_bos": True}


def as_of_6(c: dict[str, Any], where: Path) -> dict[str, Any]:
    """The config as SAELens 6 would have written it."""
    old = _DEFAULTS | {_RENAMED.get(n, n): v for n, v in c.items() if v is not None}
    for name in _REFUSED.split():
        if old.get(name):
            raise UserError(f"{where}: {name}={shown(old[name])} is not read")
    by_z = "hook_z" in str(old.get("hook_name"))
    old.setdefault("reshape_activations", "hook_z" if by_z else "none")
    if isinstance(normalised := old.get("normalize_activations", False), bool):
        old["normalize_activations"] = ("none", "expected_average_only_in")[normalised]
    new = {name: old[name] for name in _KEPT.split() if name in old}
    return new | {
        "apply_b_dec_to_input": old.get("apply_b_dec_to_input", True),
        "metadata": {n: old[n] for n in _OF_MODEL.split() if n in old},
        **_activation(old, where),
    }


def _activation(old: dict[str, Any], where: Path) -> dict[str, Any]:
    """The architecture, and k of a TopK, which was an activation function then."""
    kwargs = old.get("activation_fn_kwargs") or {}
    function, architecture = old["activation_fn"], old["architecture"]
    if function == "relu" and not kwargs:
        k = {"k": old["k"]} if architecture == "topk" and "k" in old else {}
        return {"architecture": architecture, **k}
    if (
        function == "topk"
        and isinstance(kwargs, dict)
        and kwargs.keys() == {"k"}
        and architecture in ("standard", "topk")
    ):
        return {"architecture": "topk", "k": kwargs["k"]}
    raise UserError(
        f"{where}: activation_fn {shown(function)} of a {shown(architecture)} with "
        f"{shown(kwargs)} is not read; expected relu, or topk with its k"
    )
