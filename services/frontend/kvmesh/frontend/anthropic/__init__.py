"""Anthropic's Messages API, served by the way of chat completions: its bodies, its answers, its errors."""
