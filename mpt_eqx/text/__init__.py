"""Text in and out, with the `tokenizers` library (extra `text`)."""

from mpt_eqx.text.stops import until_stop as until_stop
from mpt_eqx.text.tokenizer import Tokenizer as Tokenizer
from mpt_eqx.text.tokenizer import load_tokenizer as load_tokenizer
