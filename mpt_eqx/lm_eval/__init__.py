"""MPT as a model of lm-evaluation-harness (extra `eval`), called `mpt-eqx` there, without torch.

Importing this makes the harness know it; `python -m mpt_eqx.lm_eval` is the harness's own command line with it. Its
log-likelihoods are those of `mpt_eqx.score`, its texts those of `mpt_eqx.generate`.
"""

from mpt_eqx.lm_eval.model import MPTLM as MPTLM
