"""`FrontendService`, the same by gRPC as by HTTP."""
