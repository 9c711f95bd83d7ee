"""From a bus into a handler's commit: accept, order, run, retry, commit, acknowledge.

One way, each stage a class that takes events in flight and hands them on: `intake -> admission -> lanes -> gate ->
runners -> verdicts -> pending -> commits -> acknowledgement` (`stages` puts them together). The states of an event and
the transitions between them are one table (`inflight`). An event returns to an earlier stage only through the lanes.

Internal: hosting runs it, one pipeline per partition. It reaches stores and buses through their ports. It opens
none, and knows no process, no signal and no command.
"""
