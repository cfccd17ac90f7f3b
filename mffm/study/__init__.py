"""Studies: how many expensive labels are needed, and which method makes the most of them."""
