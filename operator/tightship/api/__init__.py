"""The API of Tightship: the three kinds, their units, and the files generated from them."""
