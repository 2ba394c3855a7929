"""A valid body to the answers it asks for, the same from REST and gRPC."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.models import Model
from kvmesh.frontend.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from kvmesh.frontend.protocol.completions import DEFAULT_MAX_TOKENS
from kvmesh.frontend.protocol.constraints import Named
from kvmesh.frontend.protocol.generation import choice_seed
from kvmesh.frontend.protocol.long import conversation
from kvmesh.frontend.protocol.strict import strict_calls
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.call import Call, check_generates, most_tokens, within_context
from kvmesh.frontend.serving.infill import infill_prompt
from kvmesh.frontend.serving.text import Reading, TextOptions
from kvmesh.frontend.tenants.charge import Share
from kvmesh.v1.common_pb2 import CAPABILITY_CONSTRAIN
from kvmesh.v1.engine_pb2 import SamplingParams

# Of the prompt's tokens, those that say whether the answer begins within reasoning.
_TAIL = 16


async def chat_answers(
    gateway: Gateway,
    body: ChatCompletionRequest,
    request_id: str,
    *,
    received: float,
    timeout_s: float | None = None,
) -> Answers:
    """Raises KvmeshError for whatever can be known before anything runs."""
    body.check()
    turns, template_args = await conversation(body), body.template_args()
    calls = _Calls(gateway, body, request_id, received, timeout_s)
    scope = gateway.cache_scope(body.kvmesh.tenant)
    model = calls.model
    encoded = model.tokenizer.encode_chat(turns, template_args, scope, most_tokens(model))
    prompt = await within_context(model, encoded, "messages")
    ignored = [] if calls.hold_calls(body) else ["strict"]
    if body.metadata and not body.store:
        ignored.append("metadata")
    calls.add(prompt, "messages")
    options = TextOptions(body.stops(), reading=_reading(body, calls, prompt))
    return Answers(gateway.mesh, calls.calls, lambda _: options, calls.choices, ignored)


async def completion_answers(
    gateway: Gateway,
    body: CompletionRequest,
    request_id: str,
    *,
    received: float,
    timeout_s: float | None = None,
) -> Answers:
    """Raises KvmeshError for whatever can be known before anything runs."""
    body.check()
    calls = _Calls(gateway, body, request_id, received, timeout_s)
    tokenizer = calls.model.tokenizer
    texts = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            text = infill_prompt(calls.model, prompt, body.suffix) if body.suffix else prompt
            encoded = tokenizer.encode(text, limit=most_tokens(calls.model))
            prompt_ids = await within_context(calls.model, encoded, "prompt")
            calls.add(prompt_ids, "prompt", default_output=DEFAULT_MAX_TOKENS)
            texts.append(prompt if body.echo else "")
        else:
            calls.add(prompt, "prompt", ids_from_client=True, default_output=DEFAULT_MAX_TOKENS)
            texts.append(tokenizer.text.decode(prompt) if body.echo else "")
    # Of the body, which holds its prompts, nothing more is kept while the answers come.
    stops, echoes, silent, choices = body.stops(), bool(body.echo), body.max_tokens == 0, calls.choices

    def options(number: int) -> TextOptions:
        return TextOptions(stops, echo=texts[number // choices] if echoes else None, silent=silent)

    return Answers(gateway.mesh, calls.calls, options, choices)


async def token_answers(
    gateway: Gateway,
    body: CompletionRequest,
    request_id: str,
    *,
    received: float,
    timeout_s: float | None = None,
    prompt_logprobs: bool = False,
) -> Answers:
    """Of a prompt in token ids, for who takes the answer in token ids: as long as there is room."""
    body.check()
    calls = _Calls(gateway, body, request_id, received, timeout_s, prompt_logprobs)
    for prompt in body.prompts():
        assert not isinstance(prompt, str), "the prompt is token ids"
        calls.add(prompt, "token_ids", ids_from_client=True)
    return Answers(gateway.mesh, calls.calls, lambda _: TextOptions(), calls.choices)


class _Calls:
    """Makes the calls of one body: of each prompt as many as it wants choices."""

    def __init__(
        self,
        gateway: Gateway,
        body: GenerationRequest,
        request_id: str,
        received: float,
        timeout_s: float | None,
        prompt_logprobs: bool = False,
    ) -> None:
        self._gateway, self._body, self._request_id = gateway, body, request_id
        self._received, self._timeout_s = received, timeout_s
        self._sampling = body.sampling()
        if prompt_logprobs:
            self._sampling.prompt_logprobs = True
        self._hint = body.return_hint()
        self._params: dict[str, str] = {}
        named = body.constraint()
        if named is not None:
            self._constrain(named)
        self.model: Model = gateway.models.resolve(body.model)
        check_generates(self.model)
        self.choices = body.drawn()
        self.calls: list[Call] = []

    @property
    def constrained(self) -> bool:
        """Whether the answer is bound from its first token on, which leaves no room for reasoning."""
        return self._sampling.constraint.WhichOneof("kind") not in (None, "structural_tag")

    def hold_calls(self, body: ChatCompletionRequest) -> bool:
        """Before the first prompt: hold calls that the model makes of itself to strict functions' schemas.

        False: it is asked for, and cannot be done.
        """
        # An answer that is bound from its first token on has no other calls than those it is bound to.
        if not body.wants_strict_calls() or self.constrained:
            return True
        if self._sampling.HasField("constraint") or not self.model.can(CAPABILITY_CONSTRAIN):
            return False
        named = strict_calls(body.functions(), self.model.tool_format, body.tools_field())
        if named is not None:
            self._constrain(named)
        return named is not None

    def add(
        self,
        token_ids: Sequence[int],
        param: str,
        *,
        ids_from_client: bool = False,
        default_output: int | None = None,
    ) -> None:
        """All choices of a prompt; `param` is the client's name for it."""
        body = self._body
        for choice in range(self.choices):
            # One engine request is one choice, with a name of its own.
            number = len(self.calls)
            self.calls.append(
                self._gateway.call(
                    f"{self._request_id}-{number}" if number else self._request_id,
                    self.model,
                    token_ids,
                    self._choice_sampling(choice),
                    param=param,
                    received=self._received,
                    timeout_s=self._timeout_s,
                    ids_from_client=ids_from_client,
                    default_output=default_output,
                    explain=body.kvmesh.explain,
                    policy=body.kvmesh.policy,
                    session_id=body.session_id(),
                    tenant=body.kvmesh.tenant,
                    priority=body.priority(),
                    hint=self._hint,
                    deadline_ms=body.kvmesh.deadline_ms,
                    params=self._params,
                    share=Share(request=not number, prompt=not choice),
                )
            )

    def _constrain(self, named: Named) -> None:
        self._sampling.constraint.CopyFrom(named.constraint)
        self._params["constraint"] = named.param

    def _choice_sampling(self, choice: int) -> SamplingParams:
        # `bound_output` completes it for its prompt.
        sampling = SamplingParams()
        sampling.CopyFrom(self._sampling)
        if sampling.HasField("seed"):
            sampling.seed = choice_seed(sampling.seed, choice)
        return sampling


def _reading(body: ChatCompletionRequest, calls: _Calls, prompt: Sequence[int]) -> Reading:
    """What the answer to a prompt is looked through for."""
    named = body.forced_function()
    if named is not None:
        return Reading(named_function=named.name)
    functions = [function.name for function in body.functions()]
    if body.must_call():
        return Reading("json", functions, only_calls=True)
    model = calls.model
    reading = Reading(reasoning_format=model.reasoning_format)
    if functions:
        reading.tool_format, reading.functions = model.tool_format, functions
        reading.one_call = body.parallel_tool_calls is False
    if model.reasoning_format is not None:
        begins = model.tokenizer.text.opens_reasoning(prompt[-_TAIL:], model.reasoning_format)
        reading.in_reasoning = False if calls.constrained else begins
    return reading
