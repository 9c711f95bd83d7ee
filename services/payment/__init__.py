"""The Payment service: holds, captures and refunds the customer's money through a payment gateway."""

from services.payment.service import payment

__all__ = ["payment"]
