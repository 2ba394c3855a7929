"""The KV block manager's process: owns a node's tiers below the device."""
