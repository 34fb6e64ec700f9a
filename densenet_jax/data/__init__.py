"""Data sets: reads records, decodes and crops images, and orders them into batches."""
