"""Which text a run reads, and how it becomes rows of tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from hasten.recipe.fields import Choices, Sources, Text, as_tuple
from hasten.recipe.schema import Expected

if TYPE_CHECKING:
    from hasten.data.corpus import CorpusSpec

Weights = Annotated[
    tuple[Annotated[float, Field(gt=0.0, lt=1e300)], ...],
    BeforeValidator(as_tuple),
    Expected("a list of numbers above 0, one for each source of data.train, as [0.7, 0.3]"),
]
_SMALLEST_SHARE = 2.0**-40  # as in `hasten.data.mixture`, which a recipe does not load


class DataChoices(Choices):
    """Which text is trained on, which is held out, and how both become tokens.

    Args:
        train: sources of the training text: a built-in corpus, a file, a folder, a glob or ``-``; or a list of them.
            Or prepared data alone: the folder that ``hasten prepare`` made, or its URL (``s3://bucket/folder``).
        weights: shares of the tokens to read from each source of `train`, as many as there are, above 0; only their
            ratios matter. Sources that are too small for their share are read several times. Without weights the
            sources are one corpus.
        val: sources of the held-out text; without them a share of the documents is held out.
        val_share: that share, above 0 and at most 0.5.
        text_key: the key that holds the text of a JSON record or a parquet row.
        separator: text between the documents of one large file.
        tokenizer: ``bpe`` (trained on the corpus), ``bytes``, or the path of a `tokenizer.json` or its folder.
        vocab_size: of a ``bpe`` tokenizer, at least 257.
        packing: how documents fill rows: ``best_fit`` cuts only those longer than a row; ``chunk`` joins all and cuts
            every `seq_len` tokens; ``pad`` gives each piece a row of its own.
        overflow: what becomes of a document longer than a row: ``split`` keeps all of it in several rows, ``truncate``
            its beginning, ``drop`` nothing.
        shuffle_tokens: about how many tokens are mixed at a time, at least 4,194,304; without it half a billion of
            packed rows and all of ``chunk``. Fewer let text on object storage be read once in an epoch through a cache
            of two and a half times as many.
        document_mask: whether a token sees only its own document.
        on_damage: what a run does when stored tokens that a step reads are found damaged: ``stop``, or ``skip`` the
            step and go on with the next; which steps were skipped is recorded, so going on stays exact.
    """

    train: Sources = "python"
    weights: Weights | None = None
    val: Sources | None = None
    val_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.05
    text_key: Text = "text"
    separator: Text | None = None
    tokenizer: Text = "bpe"
    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 4096
    packing: Literal["best_fit", "chunk", "pad"] = "best_fit"
    overflow: Literal["split", "truncate", "drop"] = "split"
    shuffle_tokens: Annotated[int, Field(ge=2**22, le=2**48)] | None = None
    document_mask: bool = True
    on_damage: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        default = type(self).model_fields
        if self.val is None and self.val_share == 0:
            raise ValueError("data.val_share=0 holds nothing out: give data.val=FILE, or a share above 0.")
        if self.val is not None and self.val_share not in (0, default["val_share"].default):
            raise ValueError(
                f"data.val_share={self.val_share:g} has no effect beside data.val={self.val!r}: leave one of them out."
            )
        if both := sorted(set(_listed(self.train)) & set(_listed(self.val))):
            raise ValueError(f"data.val={both[0]!r} is also trained on: hold out other text, or leave data.val out.")
        if self.tokenizer != "bpe" and self.vocab_size != default["vocab_size"].default:
            raise ValueError(
                f"data.vocab_size={self.vocab_size} has no effect with data.tokenizer={self.tokenizer!r}, "
                "whose vocabulary is its own: leave data.vocab_size out."
            )
        if self.packing == "chunk" and self.overflow != "split":
            raise ValueError(
                f"data.overflow={self.overflow!r} has no effect with data.packing='chunk', which cuts every document "
                "where a row ends: leave data.overflow out, or give data.packing=best_fit."
            )
        if self.weights is not None:
            self._refuse_bad_mixture(self.weights)
        return self

    def _refuse_bad_mixture(self, weights: tuple[float, ...]) -> None:
        sources = _listed(self.train)
        if len(sources) == 1:
            raise ValueError(
                f"data.weights={list(weights)} has no effect with the one source data.train={sources[0]!r}: leave the "
                "weights out, or give a list of sources, such as data.train=['a.txt', 'b.txt']."
            )
        if len(weights) != len(sources):
            raise ValueError(
                f"data.weights={list(weights)} has {len(weights)} number{'s' * (len(weights) != 1)} for the "
                f"{len(sources)} sources of data.train: give one for each."
            )
        if twice := [source for source in sources if sources.count(source) > 1]:
            raise ValueError(
                f"data.train names {twice[0]!r} twice, and a mixture reads each source by its own weight: name it once."
            )
        total = math.fsum(weights)
        for source, weight in zip(sources, weights):
            if weight / total < _SMALLEST_SHARE:
                raise ValueError(
                    f"data.weights={list(weights)} gives {source!r} less than one row in 10**12: leave that source "
                    "out, or give it a larger weight."
                )

    def build(self) -> CorpusSpec:
        """Return what `hasten.data.corpus.open_corpus` opens."""
        from hasten.data.corpus import CorpusSpec

        return CorpusSpec(
            train=_listed(self.train),
            val=_listed(self.val),
            val_share=self.val_share,
            text_key=self.text_key,
            separator=self.separator,
            apart=self.weights is not None,
        )


def _listed(sources: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if sources is None else (sources,) if isinstance(sources, str) else sources
