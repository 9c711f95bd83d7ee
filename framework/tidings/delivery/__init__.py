"""From a bus into a handler's commit: accept, order, run, retry, commit, acknowledge.

One way, each stage a class that takes events in flight and hands them on: `intake -> admission -> lanes -> gate ->
runners -> verdicts -> commits -> acknowledgement` (`stages` puts them together). The states of an event and every way
between them are one table (`inflight`); an event comes back to an earlier stage through the lanes alone.

Internal: hosting runs it, one pipeline per partition. It reaches stores and buses through their ports; it opens none,
and knows no process, no signal and no command.
"""
