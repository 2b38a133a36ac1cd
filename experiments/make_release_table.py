"""Makes the bundled table of SAELens' release names again.

Claim:    a name such as gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical
          leads to its files without SAELens and its torch.
Command:  python -m experiments.make_release_table \
              --yaml=site-packages/sae_lens/pretrained_saes.yaml --version=6.54.12
Expected: of that version, the bundled table bit for bit: 170 releases, 13,857 names,
          25 kB.
"""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import yaml

import vsae_jax
from vsae_jax.config import cli
from vsae_jax.config.fields import flag
from vsae_jax.interop import releases
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class TableConfig:
    """Extracts names and places from SAELens' pretrained_saes.yaml."""

    yaml: str = flag("SAELens' pretrained_saes.yaml", "")
    version: str = flag("the version of SAELens that it is from", "")

    def __post_init__(self):
        if not self.yaml or not self.version:
            raise UserError("--yaml and --version must be set: the file and its source")


def run(c: TableConfig) -> Path:
    """Writes the table into the package; returns its path."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    stored = yaml.load(Path(c.yaml).read_text("utf-8"), Loader=loader)
    table = {
        "source": f"pretrained_saes.yaml of sae-lens {c.version}",
        "releases": releases.from_saelens(stored),
    }
    path = Path(vsae_jax.__file__).parent / "data" / releases.TABLE
    text = json.dumps(table, separators=(",", ":"), sort_keys=True)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    n = sum(len(found["saes"]) for found in table["releases"].values())
    print(
        f"wrote {path}: {len(table['releases'])} releases, {n} names, "
        f"{path.stat().st_size} bytes"
    )
    return path


if __name__ == "__main__":
    cli.main(lambda configs: run(configs[0]) and None, TableConfig)
