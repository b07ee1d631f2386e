"""What the compiled machine code says without a GPU."""
