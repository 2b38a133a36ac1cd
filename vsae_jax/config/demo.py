"""What `demo` can be asked."""

from dataclasses import dataclass

from vsae_jax.config.fields import check_at_least, flag


@dataclass(frozen=True)
class DemoConfig:
    """Extracts, trains three autoencoders and evaluates them, offline, in about two
    minutes on two cores.

    python -m vsae_jax.demo --out=demo
    """

    out: str = flag("folder for everything the demo writes", "demo")
    steps: int = flag("optimizer steps of each autoencoder", 800)
    num_tokens: int = flag("tokens of the bundled stories", 390_000)

    def __post_init__(self):
        check_at_least(self, 1, "steps", "num_tokens")
