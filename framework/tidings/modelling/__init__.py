"""What a user declares: events, aggregates and their repositories, handlers and what is injected into them.

Internal: its public names are in `tidings`. Every room that runs a declaration may import it. It runs nothing itself,
and reaches stores only through their port.
"""
