"""Training: the loss; optimisers are optax's."""

from mpt_eqx.train.loss import next_token_loss as next_token_loss
