"""Tools that know nothing of Tidings: tasks with a lifetime, timers, escaping, limits of JSON.

Internal: every room may import it. It imports only `tidings.errors`, and knows no event, no store and no bus.
"""
