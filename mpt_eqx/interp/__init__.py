"""Inspection: capture and edit activations by name."""

from mpt_eqx.interp.edits import Ablate as Ablate
from mpt_eqx.interp.edits import Add as Add
from mpt_eqx.interp.edits import Apply as Apply
from mpt_eqx.interp.edits import Replace as Replace
from mpt_eqx.interp.edits import Scale as Scale
from mpt_eqx.interp.places import places as places
from mpt_eqx.interp.run import Run as Run
from mpt_eqx.interp.run import run as run
