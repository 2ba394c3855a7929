"""KV events between holders (workers, stores) and routers; see docs/reference/events.md.

`columns` is a batch's content, `publication` a holder's numbered stream of batches, `source` serves and
reads its snapshots and replays.
"""
