"""Shared by every service: the protocol, the operation log, the object store. No torch."""
