"""SGLang as a kvmesh engine.

`engine` is the implementation of the Engine contract; it runs in the worker's process and never
imports SGLang. `launcher` is the parent of SGLang's scheduler processes; `platform`, `plugins` and
the modules the plugins name run inside those. This file stays empty, because every one of those
processes imports it.
"""
