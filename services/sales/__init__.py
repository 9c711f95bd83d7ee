"""The Sales service: revenue per country. It joined late, and read the whole history before it went on live."""

from services.sales.service import countries, sales

__all__ = ["countries", "sales"]
