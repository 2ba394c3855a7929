"""gRPC as every role uses it: `client` for channels, `server` for interceptors and options."""
