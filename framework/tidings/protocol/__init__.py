"""What relay and services agree on: positions, buckets, gaps, and the messages that carry events between them.

Internal: buses, relay and delivery import it. Its modules are pure: they do no I/O and know no adapter.
"""
