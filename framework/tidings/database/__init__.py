"""A service's own database: its engine, and the tables that say what the service has done.

Internal: delivery, operations and hosting import it. It reads and writes rows; it does not decide
which event runs.
"""
