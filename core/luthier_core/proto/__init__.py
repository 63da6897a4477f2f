"""The binary messages of the protocol: `wire_pb2`, generated from wire.proto (`make proto`)."""
