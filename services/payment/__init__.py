"""The Payment service: holds, takes and gives back the customer's money through a payment gateway."""

from services.payment.service import payment

__all__ = ["payment"]
