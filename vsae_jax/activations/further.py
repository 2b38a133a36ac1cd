"""Rows of the text after a folder's, made when they are read.

The folder holds the rows of the beginning of a text and says how they were made. What
follows in the text is run through the same language model; its rows are never on disk.
"""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from vsae_jax.activations import text
from vsae_jax.activations.bad_rows import Check
from vsae_jax.activations.extraction import rows_for
from vsae_jax.activations.shards import Activations
from vsae_jax.lm import load_language_model, load_tokenizer
from vsae_jax.lm.files import locate
from vsae_jax.lm.weights import weights_hash
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError

_CONTEXTS_AT_ONCE = 32


class FurtherRows:
    """The rows of the contexts after a folder's last, counted from 0 and without an
    end: where the text ends, reading starts again after the folder's last context.

    giant: as the flag of `train`. Raises UserError where the model is not the folder's.
    """

    def __init__(self, activations: Activations, *, giant: float):
        self._manifest = m = activations.manifest
        self._bad = Check(activations, giant=giant).bad
        files = locate(m.model, revision=m.revision or None)
        if m.weights_hash and weights_hash(files) != m.weights_hash:
            raise UserError(
                f"the weights of {m.model} are not those that {activations.folder} was "
                "made with; extract it again"
            )
        as_then: Any = {"backend": m.backend, "dtype": m.lm_dtype or "float32"}
        self._model = load_language_model(files, **as_then)
        self._contexts, self._next = self._from_start(), 0
        self._first, self._closed = True, False

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "rows d_model"]:
        """The rows start, ..., stop - 1, of whole contexts, in the folder's dtype.
        Going back is slow. The first call shows its progress; `close` ends a call.

        Raises UserError for a bad row, and where the folder holds all of the text.
        """
        m, each = self._manifest, self._manifest.rows_per_context
        first, last = start // each, stop // each
        if first < self._next:
            self._contexts, self._next = self._from_start(), 0
        ours = itertools.islice(self._contexts, first - self._next, last - self._next)
        shown = progress.bar(stop - start, unit="rows") if self._first else None
        made: list[np.ndarray] = []
        with shown or nullcontext():
            while not self._closed:
                tokens = list(itertools.islice(ours, _CONTEXTS_AT_ONCE))
                if not tokens:
                    break
                padding = _CONTEXTS_AT_ONCE - len(tokens)
                padded = np.pad(np.stack(tokens), ((0, padding), (0, 0)))
                (values,) = self._model.at(padded, [m.hook])
                made.append(np.asarray(rows_for(m, values))[: len(tokens) * each])
                if shown is not None:
                    shown.update(len(made[-1]))
        self._first, self._next = False, last
        if self._closed:
            raise UserError("the text was closed while rows of it were made")
        rows = np.concatenate(made)
        bad = np.flatnonzero(self._bad(rows))
        if len(bad):
            context = m.n_contexts + (start + int(bad[0])) // each
            raise UserError(
                f"context {context} of {m.dataset} has a row that is NaN, infinite or "
                "giant; leave out --stream and extract more, with --bad_rows=skip"
            )
        return rows

    def close(self) -> None:
        """Ends a `read` that another thread is in."""
        self._closed = True

    def _from_start(self) -> Iterator[Int[np.ndarray, " context_length"]]:
        m, tokenizer = self._manifest, load_tokenizer(self._model.files)
        while True:
            documents = text.documents(
                m.dataset, split=m.split, text_column=m.text_column
            )
            contexts = text.contexts(
                documents,
                tokenizer,
                context_length=m.context_length,
                bos_id=m.bos_id,
                bos=m.bos,
            )
            further = itertools.islice(contexts, m.n_contexts, None)
            if (one := next(further, None)) is None:
                raise UserError(
                    f"{m.dataset} has no text after the {m.n_contexts} contexts that "
                    "are extracted; leave out --stream"
                )
            yield one
            yield from further
