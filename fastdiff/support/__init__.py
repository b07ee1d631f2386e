"""What several rooms need: caches, checks of numbers and modules, transforms, files of weights."""
