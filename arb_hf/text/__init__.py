"""Text to calibrate on and to evaluate on: names, files, lists, data sets and streams are read alike.

Text is read as a stream of pieces and only as far as it is needed; memory is bounded by what is kept, not by the text::

    open_data          what was passed -> rows (Table, Stream, JsonLines) or a text (TextFile, RawFile)    opening, files
      text_of          a row -> its text, or an error that names row, column and cure                      rows
    as_text            rows -> a Text: pieces from any start, and starts drawn uniformly                   sources
      leading_tokens   the first token ids of a text; tokenize: all of a string                            tokens

A text of at most :data:`~arb_hf.text.tokens.SMALL` characters is read and tokenized as one string. Of a longer one,
:mod:`arb_hf.calibrate.windows` and :func:`~arb_hf.text.tokens.leading_tokens` read what they need.
"""

from .opening import NAMED, as_text, is_text_by_name, open_data, open_text, read_text
from .sources import Rows, StringText, Text
from .tokens import SMALL, leading_tokens, load_tokenizer, plain_tokenizer, read, tokenize

__all__ = [
    "NAMED",
    "SMALL",
    "Rows",
    "StringText",
    "Text",
    "as_text",
    "is_text_by_name",
    "leading_tokens",
    "load_tokenizer",
    "open_data",
    "open_text",
    "plain_tokenizer",
    "read",
    "read_text",
    "tokenize",
]
