"""Whether products of a language model are made of float32 or of bfloat16."""

from pathlib import Path

from vsae_jax.lm.files import ModelFiles

# Products take most of the time only in models at least this wide.
_WIDE = 512


def choose_dtype(files: ModelFiles, *, on_cpu: bool) -> str:
    """The dtype for `--lm_dtype=auto`: bfloat16 on a GPU, and on a CPU that has
    instructions for it, for a model at least 512 wide whose weights are stored in
    bfloat16, so that none is rounded; else float32."""
    if not on_cpu:
        return "bfloat16"
    config = {**files.config, **files.config.get("text_config", {})}
    width = config.get("hidden_size", config.get("n_embd", 0))
    stored = config.get("dtype", config.get("torch_dtype"))
    wide = isinstance(width, int) and width >= _WIDE
    fast = wide and stored == "bfloat16" and _multiplies_bfloat16()
    return "bfloat16" if fast else "float32"


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix instructions for bfloat16."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
