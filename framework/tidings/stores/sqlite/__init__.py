"""The embedded event store: the log as one SQLite file, or in memory.

Internal: `tidings.adapters` opens it by URL, and `tidings server` serves its files. It knows streams and bytes, and no
domain event, no relay and no service.
"""
