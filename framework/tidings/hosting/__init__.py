"""What runs services in a process: partitions, standing by, signals, health.

Internal: `tidings.Service.running`, `tidings.Runtime` and the command line use it. It opens and closes stores, buses
and databases, and leaves events to delivery.
"""
