"""Tools that know nothing of Tidings: tasks with a lifetime, timers, escaping, limits of JSON.

Internal: everybody may import it. It imports nothing of Tidings but `tidings.errors`, and knows no event, no store and
no bus.
"""
