"""From a checkpoint to answers about a user's images: in Python, for folders, as a file, behind a server."""
