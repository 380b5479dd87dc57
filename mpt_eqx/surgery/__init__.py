"""From a model to a changed model."""

from mpt_eqx.model.stacked import unstack as unstack
from mpt_eqx.surgery.blocks import keep_blocks as keep_blocks
from mpt_eqx.surgery.rematerialization import remat as remat
from mpt_eqx.surgery.replacement import replace as replace
from mpt_eqx.surgery.stacking import stack as stack
from mpt_eqx.surgery.vocabulary import resize_vocab as resize_vocab
