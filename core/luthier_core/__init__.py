"""What every service shares: the protocol, the operation log, the object store. Imports no torch."""
