"""Worlds: services under test with the production relay and delivery, in memory and in virtual time.

It may import every room below `testing`. It never decides what is delivered: the real classes do.
"""
