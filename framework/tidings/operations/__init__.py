"""What operators ask and do: verify, repair, replay, why, held events and dead letters, backups, causes.

Internal: the command line and health answers import it. It reads logs and databases, and changes only rows that
a service at work allows it to change. It runs no handler.
"""
