"""Bytes from and to HTTP clients: connections, TLS, bounds, server-sent events, errors."""
