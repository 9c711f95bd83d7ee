"""The event store on EventStoreDB and KurrentDB, over gRPC.

Internal: `tidings.adapters` opens it by URL. It knows streams and bytes, and no domain event, no relay and no service.
"""
