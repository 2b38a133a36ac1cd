"""`python -m vsae_jax` lists the commands; with --versions, what a bug report needs."""

import inspect
import sys
from importlib import metadata, util
from typing import Any

from vsae_jax import config, runs

# In the order in which they are needed.
COMMANDS: dict[str, Any] = {
    "demo": config.DemoConfig,
    "extract": config.ExtractConfig,
    "train": config.TrainConfig,
    "evaluate": config.EvalConfig,
    "features": config.FeaturesConfig,
    "dashboard": config.DashboardConfig,
    "maximise": config.MaximiseConfig,
    "tsne": config.MapConfig,
    "plots": config.PlotsConfig,
    "convert": config.ConvertConfig,
}
# The optional packages: distribution -> the name that is imported.
_OPTIONAL = {
    "torch": "torch",
    "matplotlib": "matplotlib",
    "scikit-learn": "sklearn",
    "tensorboardX": "tensorboardX",
    "wandb": "wandb",
}


def main(arguments: list[str]) -> int:
    """Prints what was asked for; returns the exit status."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(listing())
    elif arguments == ["--versions"]:
        print(versions())
    elif arguments[0] in COMMANDS:
        print(f"error: write python -m vsae_jax.{arguments[0]} ...", file=sys.stderr)
        return 2
    else:
        message = f"error: {arguments[0]} is not a command\n\n{listing()}"
        print(message, file=sys.stderr)
        return 2
    return 0


def listing() -> str:
    """A line about each command."""
    width = max(map(len, COMMANDS))
    lines = ["python -m vsae_jax.COMMAND --flag=value ... (--help: its flags)", ""]
    for name, config_class in COMMANDS.items():
        text = " ".join((inspect.getdoc(config_class) or "").split())
        lines.append(f"  {name:<{width}}  {text.split('. ')[0].rstrip('.')}")
    return "\n".join(
        [*lines, "", "python -m vsae_jax --versions: what to say in a bug report"]
    )


def versions() -> str:
    """The versions of Python, the platform, the packages and extras, and the
    devices."""
    import platform

    import jax

    optional = {
        name: metadata.version(name) if util.find_spec(module) else "not installed"
        for name, module in _OPTIONAL.items()
    }
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **runs.versions(),
        "transformers": metadata.version("transformers"),
        **optional,
        "devices": ", ".join(f"{d.platform} {d.device_kind}" for d in jax.devices()),
    }
    return "\n".join(f"{name}: {value}" for name, value in found.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
