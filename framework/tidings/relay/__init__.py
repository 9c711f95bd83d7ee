"""The relay: from the log to the bus, in order, with a checkpoint in the log.

Internal: `tidings.Relay` is its public name. It reads stores and publishes to buses through their ports. It knows
no service, no handler and no database.
"""
