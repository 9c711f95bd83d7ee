"""The Order service: it alone decides what state an order is in."""

from services.order.order import Order, OrderRefused, Status
from services.order.service import orders, repository

__all__ = ["Order", "OrderRefused", "Status", "orders", "repository"]
