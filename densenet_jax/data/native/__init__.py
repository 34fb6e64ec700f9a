"""The optional compiled helper: decodes of a JPEG file only what a crop needs. See `build`."""
