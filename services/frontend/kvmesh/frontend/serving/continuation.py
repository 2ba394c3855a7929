"""What is left of an answer whose worker was lost: prompt and output so far are another worker's prompt.

Its KV is found where it is cached, by the router as for any prompt, and computed where it is not.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

from kvmesh.frontend.serving.call import TOKEN, Call
from kvmesh.v1.engine_pb2 import SamplingParams


class Continuation:
    """Remembers the output of a call that another worker could go on with."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._output = array(TOKEN)
        # Whether another engine would go on as the first one.
        self.possible = _is_possible(call.sampling)

    def add(self, token_ids: Sequence[int]) -> None:
        """Tokens that the client has been given."""
        if self.possible:
            self._output.extend(token_ids)

    def rest(self) -> Call | None:
        """The call for what is left. None: nothing is, or no other worker would go on as the lost one."""
        call, done = self._call, len(self._output)
        if not self.possible or done >= call.sampling.max_new_tokens:
            return None
        sampling = SamplingParams()
        sampling.CopyFrom(call.sampling)
        sampling.max_new_tokens -= done
        if sampling.HasField("min_new_tokens"):
            sampling.min_new_tokens = max(0, sampling.min_new_tokens - done)
        sampling.ClearField("prompt_logprobs")
        return replace(call, token_ids=call.token_ids + self._output, sampling=sampling, first_by=None)


def _is_possible(sampling: SamplingParams) -> bool:
    """Penalties count the output, and a constraint is somewhere in its grammar: only the engine knows. Seeds
    hang on a token's position alone."""
    counted = (sampling.frequency_penalty, sampling.presence_penalty)
    repetition = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    return not any(counted) and repetition == 1.0 and not sampling.HasField("constraint")
