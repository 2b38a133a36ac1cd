"""What SAEBench 0.6 does differently from us: a switch for each.

`--saebench_compatible` turns all of them on, `--quirks` some. Their effects are
measured in docs/results.md.
"""

import dataclasses
from dataclasses import dataclass

from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class Quirks:
    """Each switch: the section of docs/saebench.md, what SAEBench does, [what we do].

    mean_in_variance: 1.4, the explained variance's total keeps the mean, and averages
      over batches [the mean is removed].
    batch_sums: 1.4, `mse` is a squared norm over the tokens of a batch, `l1` is signed
      [a mean over tokens and dimensions; absolute values].
    kl_underflow: 1.3, the log of a softmax: a probability of 0 makes the score -1 [from
      log-probabilities].
    validate_on_test: 2.3, a probe's epoch is chosen by its test accuracy [by that of a
      fifth of the training sample].
    fixed_epochs: 2.3, as many epochs however few texts there are, which leaves a probe
      of few texts untrained [as many steps as with 4,000 texts].
    resample: 2.2, a new sample at every call [one per class for all that is compared].
    padding_leak: 4.5, an ablated latent that is active at x = 0 is taken away once for
      each masked position [at the tokens].
    surplus_latents: 4.4, where fewer latents than asked for have a positive effect,
      others are ablated with them, by torch's order of equal effects (its CPU's; a GPU
      may take others) [only those].
    stored_norms: 2.5, latents and decoder rows as stored, whatever the decoder's norms
      [each latent times the norm of its decoder row, which then has norm 1; scores do
      not change with the parametrisation].
    ties_missing: 5.5, no SCR metric where the biased probe is as good on both tasks
      [the mean of both directions].
    """

    mean_in_variance: bool = False
    batch_sums: bool = False
    kl_underflow: bool = False
    validate_on_test: bool = False
    fixed_epochs: bool = False
    resample: bool = False
    padding_leak: bool = False
    surplus_latents: bool = False
    stored_norms: bool = False
    ties_missing: bool = False

    @property
    def names(self) -> list[str]:
        """Those that are on."""
        return [name for name, on in dataclasses.asdict(self).items() if on]


NAMES = tuple(field.name for field in dataclasses.fields(Quirks))


def read_quirks(names: str, *, all_of_them: bool) -> Quirks:
    """The quirks that `--quirks` names, or all of them; refuses an unknown name."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in NAMES:
            raise UserError(
                f"--quirks={name} is not known; there is {', '.join(NAMES)}"
            )
    return Quirks(**dict.fromkeys(NAMES if all_of_them else wanted, True))
