"""The HTTP front: the only part that users talk to. Holds no state of its own."""
