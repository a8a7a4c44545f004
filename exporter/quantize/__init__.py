"""Numbers from floats: round to nearest, and re-packing what lies on the MXFP4 grid already."""

# Raised by every change that alters a code or a scale: numbers of different versions are never mixed.
NUMBERS = 1
