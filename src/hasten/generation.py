"""Text that a model writes, token by token.

Dimensions: V vocabulary.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hasten.data.tokenizer import Tokenizer, load_tokenizer
from hasten.errors import RecipeError, RunError
from hasten.model import Decoder, read_model

_UNFINISHED = "\ufffd".encode()


def generate(
    model: Decoder | str | Path,
    tokenizer: Tokenizer | None = None,
    prompt: str = "",
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces of whole characters, until the document ends.

    The settings are checked at the call, before the first piece is asked for. Text longer than the model was trained
    for goes on from its last half row; of a longer prompt only the last row is seen.

    Args:
        model: a folder in Hugging Face format, or a `Decoder`, which needs its `tokenizer` too.
        tokenizer: None reads the one in the model's folder.
        prompt: the beginning of a document, not repeated in what is yielded.
        max_tokens: how many tokens to write at most, 0 or more.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: draw among the fewest likeliest tokens whose probabilities reach this sum, above 0, at most 1 (all).
        seed: the same one gives the same text; None: another text each time. The global random state is neither
            read nor moved.

    Raises:
        RecipeError: a setting out of its range.
        RunError: the folder holds no model that can be read, or the model's logits are not finite.
        DataError: the tokenizer cannot be read.

    Example:
        >>> for piece in generate("runs/first/final", prompt="def "):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """
    if type(max_tokens) is not int or max_tokens < 0:
        raise RecipeError(f"max_tokens is {max_tokens!r}; it must be a whole number of at least 0")
    if not 0 <= temperature < math.inf:
        raise RecipeError(f"temperature is {temperature!r}; it must be 0 (likeliest token) or above")
    if not 0 < top_p <= 1:
        raise RecipeError(f"top_p is {top_p!r}; it must be above 0 and at most 1")
    if isinstance(model, (str, Path)):
        model, tokenizer = read_model(model), tokenizer or load_tokenizer(model)
    if tokenizer is None:
        raise RecipeError("a model without a folder was given; give its tokenizer too")
    context = [tokenizer.document_token, *tokenizer.encode(prompt).tolist()]
    if max(context) >= model.config.vocab_size:
        raise RunError(
            f"the tokenizer gave the id {max(context)}, and the model has {model.config.vocab_size}; "
            "give the tokenizer that it was trained with"
        )
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)

    def draw(logits_V: Tensor) -> int | None:
        known_V = logits_V[: tokenizer.vocab_size]  # some models have more rows than their tokenizer has tokens
        p_V = probabilities(known_V, temperature=temperature, top_p=top_p)
        token = int(torch.multinomial(p_V, 1, generator=generator))
        return None if token == tokenizer.document_token else token

    drawn = _tokens(model, context, max_tokens, draw)
    return _characters(drawn, tokenizer, context[-1])


def probabilities(logits_V: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Return with what probability each token is drawn.

    `softmax(logits / temperature)`, of which the fewest likeliest tokens whose sum reaches `top_p` are kept and
    scaled to 1; temperature 0 puts all on the likeliest (the first of equals).
    """
    logits_V = logits_V.float()
    if temperature == 0:
        return torch.zeros_like(logits_V).scatter_(0, logits_V.argmax(), 1.0)
    p_V = ((logits_V - logits_V.max()) / temperature).softmax(-1)  # no overflow at a temperature near 0
    if top_p < 1:
        sorted_V, order_V = p_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(0) - sorted_V  # probability of all that is likelier
        p_V = p_V.index_fill(0, order_V[before_V >= top_p], 0.0)
    return p_V / p_V.sum()


@torch.no_grad()
def _tokens(model: Decoder, context: list[int], max_tokens: int, draw: Callable[[Tensor], int | None]) -> Iterator[int]:
    """Yield what `draw` makes of the logits after `context`, until it returns None."""
    capacity, device = model.config.seq_len, model.lm_head.weight.device
    room = min(capacity, len(context) + max_tokens)  # a model may claim a length that no memory holds
    cache, unseen = model.new_cache(capacity=room), context[-capacity:]
    for _ in range(max_tokens):
        if cache.length + len(unseen) > capacity:  # begin anew from the last half row
            cache, unseen = model.new_cache(capacity=room), context[-max(1, capacity // 2) :]
        logits_V = model(torch.tensor([unseen], device=device), cache=cache)[0, -1].cpu()
        if not logits_V.isfinite().all():
            raise RunError("the model's logits are not finite; it diverged in training, take an earlier checkpoint")
        token = draw(logits_V)
        if token is None:
            return
        yield token
        context, unseen = [*context[-capacity:], token], [token]


def _characters(tokens: Iterable[int], tokenizer: Tokenizer, last: int) -> Iterator[str]:
    """Decode a stream of tokens as it comes; bytes are held back until their character is whole.

    A token is decoded together with the one shown before it, `last` at first: some tokenizers write the space between
    two words only when they see both. A character that the last token leaves unfinished is not shown.
    """
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    before = [] if last == tokenizer.document_token else [last]
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        new = tokenizer.decode_bytes([*before, *waiting])[len(tokenizer.decode_bytes(before)) :]
        if not tokenizer.is_byte_level and new.endswith(_UNFINISHED) and len(waiting) < 4:
            continue  # a character spelt out in byte tokens; it has four at most
        before, waiting = waiting, []
        if text := characters.decode(new):
            yield text
