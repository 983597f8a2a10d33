"""Which text a run reads, and how it becomes rows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from hasten.recipe.fields import Choices, Sources, Text

if TYPE_CHECKING:
    from hasten.data.corpus import CorpusSpec


class DataChoices(Choices):
    """Which text is trained on, which is held out, and how both become tokens.

    Args:
        train: sources of the training text: a built-in corpus, a file, a folder, a glob or ``-``; or a list of them.
        val: sources of the held-out text; without them a share of the documents is held out.
        val_share: that share, above 0 and at most 0.5.
        text_key: the key that holds the text of a JSON record or a parquet row.
        separator: text between the documents of one large file.
        tokenizer: ``bpe`` (trained on the corpus), ``bytes``, or the path of a `tokenizer.json` or its folder.
        vocab_size: of a ``bpe`` tokenizer, at least 257.
        document_mask: whether a token sees only its own document.
    """

    train: Sources = "python"
    val: Sources | None = None
    val_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.05
    text_key: Text = "text"
    separator: Text | None = None
    tokenizer: Text = "bpe"
    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 4096
    document_mask: bool = True

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
        return self

    def build(self) -> CorpusSpec:
        """Return what `hasten.data.corpus.open_corpus` opens."""
        from hasten.data.corpus import CorpusSpec

        return CorpusSpec(
            train=_listed(self.train),
            val=_listed(self.val),
            val_share=self.val_share,
            text_key=self.text_key,
            separator=self.separator,
        )


def _listed(sources: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if sources is None else (sources,) if isinstance(sources, str) else sources
