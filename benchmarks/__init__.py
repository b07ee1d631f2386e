"""All measuring. Nothing here is installed with the package."""
