"""Drop-in replacements for classes of other libraries. Each module needs the extra of that library's name."""
