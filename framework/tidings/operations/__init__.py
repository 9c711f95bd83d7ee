"""What operators ask and do: verify, repair, replay, why, held events and dead letters, backups, causes.

Internal: the command line and the health endpoints import it. It reads logs and databases, and changes only rows that
may change while the service is at work. It runs no handler.
"""
