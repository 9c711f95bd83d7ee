"""What operators ask and order: verify, repair, replay, why, held events and dead letters, backups, causes.

Internal: the command line and health answers import it. It reads logs and databases, and changes rows only where a
service at work allows it; it runs no handler.
"""
