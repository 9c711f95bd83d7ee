"""The PostgreSQL event store: the log as one table in a schema of its own, beside whatever else the database holds.

Internal: `tidings.adapters` opens it by URL. It knows streams and bytes, and no domain event, no relay and no service.
"""
