"""Where records lie, bytes to uint8 crops, and the order in which batches come."""
