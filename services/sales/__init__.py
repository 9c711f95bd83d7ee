"""The Sales service: revenue per country. It was added late, and read the whole history first."""

from services.sales.service import countries, sales

__all__ = ["countries", "sales"]
