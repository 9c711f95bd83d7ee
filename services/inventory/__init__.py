"""The Inventory service: what lies on the shelves, what is promised to orders, what has left."""

from services.inventory.service import inventory

__all__ = ["inventory"]
