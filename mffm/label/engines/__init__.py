"""The codes that compute labels; each imports its own when it is called."""
