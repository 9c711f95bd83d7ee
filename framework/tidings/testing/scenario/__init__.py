"""Given, when, then: tests that state events, and compare the events that come of them, without a server or a file.

Use it through the names in `tidings.testing`. A decision of an aggregate runs without an event loop; a handler runs on
a log and a database in memory, by the code that runs it in production. It starts no relay, no bus and no task that
outlives a test.
"""
