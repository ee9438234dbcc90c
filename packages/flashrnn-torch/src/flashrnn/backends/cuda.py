"""`cuda`: the persistent kernels with no limit on D; what the chip cannot keep of R is streamed at every step.

All but the plan is `cuda_fused`'s.
"""

from __future__ import annotations

import functools

from flashrnn.backends import cuda_fused
from flashrnn_core.cuda.streamed import make_plan

supports = functools.partial(cuda_fused.supports, make=make_plan)
saved_states = cuda_fused.saved_states
saved_dtype = cuda_fused.saved_dtype
forward = functools.partial(cuda_fused.forward, make=make_plan)
backward = functools.partial(cuda_fused.backward, make=make_plan)
microseconds = functools.partial(cuda_fused.microseconds, make=make_plan)
