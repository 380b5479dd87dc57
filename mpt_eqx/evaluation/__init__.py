"""Evaluation: log-likelihoods of given texts."""

from mpt_eqx.evaluation.perplexity import Perplexity as Perplexity
from mpt_eqx.evaluation.perplexity import perplexity as perplexity
from mpt_eqx.evaluation.score import Score as Score
from mpt_eqx.evaluation.score import score as score
