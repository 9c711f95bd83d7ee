"""A service's own database: its engine, and the tables in which a service remembers what it has done.

Internal: delivery, operations and hosting import it. It says how rows are read and written; it decides nothing about
which event runs.
"""
