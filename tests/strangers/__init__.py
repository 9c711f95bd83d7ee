"""Packages as somebody else would write them against Tidings' ports. Tests install them; nothing here imports them."""
