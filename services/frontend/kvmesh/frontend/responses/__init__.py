"""OpenAI's Responses API, served by the way of chat completions: bodies, events, what is kept."""
