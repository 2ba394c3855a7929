"""What every kvmesh role shares: configuration, errors, telemetry, gRPC, the bus, discovery."""
