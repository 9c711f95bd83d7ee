"""The importer: reads real orders and returns from `online-retail.csv`. It knows nothing of the services."""

from services.importer.invoices import Dropped, Finding, Goods, Invoice, Kind, Reason, SetAside, invoices
from services.importer.report import Report
from services.importer.rows import BrokenFile, Row, read_rows

__all__ = [
    "BrokenFile",
    "Dropped",
    "Finding",
    "Goods",
    "Invoice",
    "Kind",
    "Reason",
    "Report",
    "Row",
    "SetAside",
    "invoices",
    "read_rows",
]
