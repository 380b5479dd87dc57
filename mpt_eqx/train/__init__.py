"""Training: the loss, the optimizers and schedules of the MPT recipes, a step over any optimizer, data, and states."""

from mpt_eqx.train.documents import read_documents as read_documents
from mpt_eqx.train.loop import mean_loss as mean_loss
from mpt_eqx.train.loop import run as run
from mpt_eqx.train.loss import next_token_loss as next_token_loss
from mpt_eqx.train.operations import count_step_flops as count_step_flops
from mpt_eqx.train.optimizers import decoupled_adamw as decoupled_adamw
from mpt_eqx.train.optimizers import decoupled_lionw as decoupled_lionw
from mpt_eqx.train.optimizers import named as named
from mpt_eqx.train.optimizers import not_named as not_named
from mpt_eqx.train.packing import Packed as Packed
from mpt_eqx.train.packing import batches as batches
from mpt_eqx.train.packing import pack as pack
from mpt_eqx.train.recipes import RECIPES as RECIPES
from mpt_eqx.train.recipes import Recipe as Recipe
from mpt_eqx.train.sampler import Sampler as Sampler
from mpt_eqx.train.saved_states import restore_state as restore_state
from mpt_eqx.train.saved_states import save_state as save_state
from mpt_eqx.train.schedules import cosine_with_warmup as cosine_with_warmup
from mpt_eqx.train.schedules import linear_with_warmup as linear_with_warmup
from mpt_eqx.train.state import TrainState as TrainState
from mpt_eqx.train.step import make_train_step as make_train_step
from mpt_eqx.train.stopping import check_finite as check_finite
from mpt_eqx.train.stopping import stop_on_signals as stop_on_signals
