"""Text generation with continuous batching, many adapters on one base model."""
