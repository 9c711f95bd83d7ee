"""What a user declares: events, aggregates and their repositories, handlers and what is injected into them.

Internal: its public names are in `tidings`. Everything that runs a declaration may import it; it runs nothing itself,
and reaches stores through their port only.
"""
