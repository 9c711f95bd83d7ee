"""The Inventory service: which goods are on the shelves, reserved for orders, or shipped."""

from services.inventory.service import inventory

__all__ = ["inventory"]
