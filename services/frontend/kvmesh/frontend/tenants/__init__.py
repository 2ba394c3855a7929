"""Who asks, what they may, what they have used: keys, limits shared by all frontends, usage."""
