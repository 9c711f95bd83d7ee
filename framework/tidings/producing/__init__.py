"""Events on their way into the log from outside any handler: a program of its own, or a request with its rows.

Internal: `tidings.connect` and `Service.transaction` are its public names. It runs no handler.
"""
