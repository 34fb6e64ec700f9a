"""The model behind REST and gRPC."""
