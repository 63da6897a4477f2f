"""The binary messages of the public protocol: `wire_pb2`, generated from wire.proto by `make proto`."""
