"""From a bus into a handler's commit: accept, order, run, retry, commit, acknowledge.

Internal: hosting runs it, one per partition. It reaches stores and buses through their ports; it opens none, and knows
no process, no signal and no command.
"""
