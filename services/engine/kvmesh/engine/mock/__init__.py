"""An engine without a model: real block accounting, real KV events, modelled time.

Output is a pure function of the prompt and the sampling, whether a request is split or not, so texts can be
compared. Hundreds of workers fit on one machine.
"""

from kvmesh.engine.mock.engine import MockEngine

__all__ = ["MockEngine"]
