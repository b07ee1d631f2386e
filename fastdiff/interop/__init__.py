"""Drop-in replacements for classes of other libraries, one module per library; each needs the extra of that name."""
