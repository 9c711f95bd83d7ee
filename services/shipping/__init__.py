"""The Shipping service: prepares parcels, gives them to the carrier, and stops them while it still can."""

from services.shipping.service import shipping

__all__ = ["shipping"]
