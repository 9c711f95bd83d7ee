"""Events that enter the log from outside a handler: from a script, or from a request together with its rows.

Internal: `tidings.connect` and `Service.transaction` are its public names. It runs no handler.
"""
