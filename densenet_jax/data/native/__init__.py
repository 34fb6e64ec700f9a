"""Optional compiled helper that decodes only the part of a JPEG that a crop needs; see `build`."""
