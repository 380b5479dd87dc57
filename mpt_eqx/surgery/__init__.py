"""From a model to a changed model."""

from mpt_eqx.surgery.vocabulary import resize_vocab as resize_vocab
